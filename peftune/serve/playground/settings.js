// What a person chose, in the form and in the address: everything after the # makes the same page again.

/** Defaults of all controls; `stop` as it is typed, one string a line. */
const DEFAULTS = {
  prompt: "", temperature: 0.8, top_p: 0.95, top_k: 0, repetition_penalty: 1, max_tokens: 64, seed: 0, stop: "",
};
const NAMES = Object.keys(DEFAULTS);
const MODEL = "model";
const MODE = "mode";
const MOST_SEED = 2 ** 32;

const input = (name) => document.getElementById(name);

const modes = () => [...document.getElementsByName(MODE)];

/** What the models do: "text" or "chat". */
export const mode = () => modes().find((one) => one.checked).value;

export function choose(wanted) {
  for (const one of modes()) one.checked = one.value === (wanted === "chat" ? "chat" : "text");
}

/** A seed that nobody chose. */
export function rollSeed() {
  input("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % MOST_SEED;
}

/** Put the address into the form, defaults for what it does not say; the models that it names (none: null). */
export function fromAddress() {
  const said = new URLSearchParams(location.hash.slice(1));
  for (const name of NAMES) {
    input(name).value = said.get(name) ?? DEFAULTS[name];
    if (!input(name).validity.valid) input(name).value = DEFAULTS[name]; // a number that is none, or out of bounds
  }
  if (!said.has("seed")) rollSeed();
  mirrorAll();
  choose(said.get(MODE));
  return said.has(MODEL) ? said.getAll(MODEL) : null;
}

/** Put the form into the address; no entry in the history for every letter typed. */
export function toAddress(models) {
  const said = new URLSearchParams(NAMES.map((name) => [name, input(name).value]));
  if (mode() === "chat") said.set(MODE, mode());
  for (const model of models) said.append(MODEL, model);
  history.replaceState(null, "", `#${said}`);
}

/** The form as fields of a completion. */
export function request() {
  const number = (name) => input(name).valueAsNumber;
  const numbers = ["temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed"];
  const stop = input("stop").value.split("\n").filter(Boolean).map(unescaped);
  return { prompt: input("prompt").value, ...Object.fromEntries(numbers.map((name) => [name, number(name)])), stop };
}

/** Sliders and number fields show one value. */
export function mirror(changed) {
  if (changed.type === "radio" || changed.type === "checkbox") return;
  const slider = changed.dataset.for ? changed : document.querySelector(`[data-for="${changed.name}"]`);
  if (changed.dataset.for) input(changed.dataset.for).value = changed.value;
  else if (slider) slider.value = changed.value;
}

function mirrorAll() {
  for (const name of NAMES) mirror(input(name));
}

/** What is typed in one line as the string that is meant: \n, \t and \\ are a line feed, a tab and a backslash. */
function unescaped(typed) {
  const meant = { n: "\n", t: "\t", "\\": "\\" };
  return typed.replace(/\\([nt\\])/g, (_, letter) => meant[letter]);
}
