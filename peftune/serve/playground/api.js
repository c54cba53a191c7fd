// The server's API as this page needs it. The key stays in this tab: sessionStorage, never the address.

const KEY = "peftune-key";

/** A refusal, or a connection that failed, as one line for a person; status 0 where no answer came. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** The cards of all models; the base's has no parent. */
export async function models() {
  return (await (await ask("v1/models")).json()).data;
}

/** One whole answer. */
export async function complete(body, signal) {
  return (await ask("v1/completions", body, signal)).json();
}

/** The events of a stream, as they come. */
export async function* stream(path, body, signal) {
  const response = await ask(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read().catch(lost);
    if (done) throw new ServerError(0, "The connection ended before the text did.");
    waiting += value;
    const events = waiting.split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a comment: the server is still there
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const told = JSON.parse(data);
      if (told.error) throw new ServerError(500, told.error.message);
      yield told;
    }
  }
}

async function ask(path, body, signal) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  const sent = body && { method: "POST", body: JSON.stringify(body) };
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { ...sent, headers, signal, cache: "no-store" }).catch(lost);
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  const after = response.headers.get("Retry-After");
  const line = told.error?.message ?? `The server answered ${response.status} ${response.statusText}`;
  throw new ServerError(response.status, after ? `${line} (in ${after} s)` : line);
}

function lost(error) {
  if (error.name === "AbortError") throw error;
  throw new ServerError(0, "The server cannot be reached. Is peftune serve still running?");
}
