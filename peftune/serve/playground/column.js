// One model's column: its stream, its clock, and the base's opinion of what it wrote.

import * as api from "./api.js";
import { factor, inWords, watch } from "./details.js";
import { Tokens } from "./tokens.js";

const BASE = "base";
const LIKELIEST = 5; // tokens told beside each one
const BEFORE_SCORING = 24; // new tokens, while a text is written; the rest at its end
const SHOWN_PROMPT = 240; // characters of the prompt's end that stand before the text
const ROUTES = 4; // scores of `auto` that are told
const NAMES = { user: "You", assistant: "Model" };

export class Column {
  /** `messages`: the conversation that the model answers, in chat; null where it continues `prompt`. */
  constructor(model, prompt, messages = null) {
    this.model = model;
    this.messages = messages;
    this.answer = ""; // in chat
    this.count = 0; // tokens
    this.answering = model; // for `auto`: what it chose
    this.promptIds = [];
    this.#build(messages ? transcript(messages) : tail(prompt));
    this.tokens = new Tokens(this.output);
    if (!messages) watch(this.output, () => this.answering);
  }

  /** Write and score; resolves whatever happens, throws only where the server wants a key. */
  async run(request, signal) {
    this.began = performance.now();
    const asked = { ...request, model: this.model, return_token_ids: true };
    try {
      if (this.messages) await this.#reply(asked, signal);
      else await this.#continue(asked, signal);
      this.#say(this.reason ?? "ended");
    } catch (error) {
      if (error.name === "AbortError") this.#say("stopped");
      else this.#fail(error);
      if (error.status === 401) throw error;
    } finally {
      this.element.dataset.state = "done";
      this.output.ariaBusy = "false";
    }
    await this.#scoreTheRest();
  }

  async #continue(asked, signal) {
    let scoring = null;
    for await (const event of api.stream("v1/completions", { ...asked, logprobs: LIKELIEST }, signal)) {
      const [choice] = event.choices;
      if (choice.prompt_token_ids) this.promptIds = choice.prompt_token_ids;
      this.tokens.push(choice);
      this.#noteProgress(event);
      if (this.#waitsForScore(BEFORE_SCORING)) scoring ??= this.#scoreMeanwhile(signal).then(() => (scoring = null));
    }
    await scoring;
  }

  /** The next turn of a conversation. */
  async #reply({ prompt, ...asked }, signal) {
    for await (const event of api.stream("v1/chat/completions", { ...asked, messages: this.messages }, signal)) {
      const text = event.choices[0].delta.content ?? "";
      this.answer += text;
      this.output.append(text);
      this.#noteProgress(event);
    }
  }

  #noteProgress(event) {
    const [choice] = event.choices;
    if (event.routing && !this.routed) this.#tellRoute(event.routing);
    if (choice.token_ids?.length) {
      this.firstAt ??= performance.now();
      this.lastAt = performance.now();
      this.count += choice.token_ids.length;
    }
    this.reason = { stop: "ended", length: "length reached" }[choice.finish_reason];
    this.#say("writing");
  }

  #waitsForScore(least) {
    return this.answering !== BASE && this.tokens.ids.length - this.tokens.scored >= least;
  }

  async #score(signal) {
    const ids = [...this.promptIds, ...this.tokens.ids];
    const asked = { model: BASE, prompt: ids, max_tokens: 0, echo: true, logprobs: LIKELIEST };
    const { logprobs } = (await api.complete(asked, signal)).choices[0];
    const written = (list) => list.slice(this.promptIds.length);
    this.tokens.compare({
      token_logprobs: written(logprobs.token_logprobs), top_logprobs: written(logprobs.top_logprobs),
    });
    this.note.textContent = `On average a token is ${inWords(this.tokens.meanNats)} under the base`;
  }

  /** What fails here is asked again at the end, and told then. */
  async #scoreMeanwhile(signal) {
    return this.#score(signal).catch(() => null);
  }

  /** Also after a stop: what is there is worth its colours. */
  async #scoreTheRest() {
    try {
      if (this.#waitsForScore(1)) await this.#score();
    } catch (error) {
      this.#fail(error);
    }
    this.element.dataset.state = "scored";
  }

  #tellRoute({ model, scores = {} }) {
    this.routed = true;
    this.answering = model in scores ? model : BASE;
    const sorted = Object.entries(scores).sort(([, a], [, b]) => b - a);
    const told = sorted.slice(0, ROUTES).map(([name, nats]) => `${name} ${factor(nats)}`);
    if (sorted.length > ROUTES) told.push(`${sorted.length - ROUTES} more`);
    const where = make("strong", "", `→ ${this.answering}`);
    const why = this.answering === BASE ? "no adapter fits the prompt clearly better" : "the prompt fits it best";
    const ranks = told.length ? ` How much likelier a token of the prompt is than under the base: ${told.join(", ")}.` : "";
    this.route.replaceChildren(where, `: ${why}.${ranks}`);
    this.route.hidden = false;
  }

  #say(state) {
    const { count } = this;
    const told = [state];
    if (count) told.push(`${count} token${count > 1 ? "s" : ""}`);
    const seconds = (this.lastAt - this.firstAt) / 1000;
    if (count > 1 && seconds > 0) told.push(`${((count - 1) / seconds).toFixed(0)}/s`);
    if (this.firstAt) told.push(`first ${((this.firstAt - this.began) / 1000).toFixed(2)} s`);
    this.status.textContent = told.join(" · ");
  }

  #fail(error) {
    this.#say("failed");
    this.problem.textContent = error.message;
    this.problem.hidden = false;
  }

  #build(before) {
    this.element = make("article", "column");
    this.element.dataset.model = this.model;
    this.element.dataset.state = "writing";
    const head = make("div", "head");
    const title = make("h2", "", this.model);
    const copy = make("button", "quiet", "Copy text");
    copy.type = "button";
    copy.addEventListener("click", () => navigator.clipboard.writeText(this.messages ? this.answer : this.tokens.text));
    head.append(title, copy);
    this.route = make("p", "route");
    this.problem = make("p", "problem");
    this.route.hidden = this.problem.hidden = true;
    this.output = make("div", "output");
    const wanted = { tabIndex: 0, role: "group", ariaLive: "polite", ariaBusy: "true", ariaLabel: `Text of ${this.model}` };
    Object.assign(this.output, wanted);
    if (!this.messages) this.output.setAttribute("aria-describedby", "hint");
    this.output.append(make("span", "before", before));
    const foot = make("div", "foot");
    this.status = make("p", "status", "waiting");
    this.note = make("p", "note");
    foot.append(this.status, this.note);
    this.element.append(head, this.route, this.output, this.problem, foot);
  }
}

const tail = (prompt) => (prompt.length > SHOWN_PROMPT ? `…${prompt.slice(-SHOWN_PROMPT)}` : prompt);

const transcript = (messages) => `${messages.map(({ role, content }) => `${NAMES[role]}: ${content}\n\n`).join("")}${NAMES.assistant}: `;

function make(tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.textContent = text;
  return made;
}
