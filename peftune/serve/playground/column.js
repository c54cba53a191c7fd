// One model's column: its stream, its clock, and the base's opinion of what it wrote.

import * as api from "./api.js";
import { factor, watch } from "./details.js";
import { Tokens } from "./tokens.js";

const BASE = "base";
const LIKELIEST = 5; // tokens told beside each one
const BEFORE_SCORING = 24; // new tokens, while a text is written; the rest at its end
const SHOWN_PROMPT = 240; // characters of the prompt's end that stand before the text
const ROUTES = 4; // scores of `auto` that are told

export class Column {
  constructor(model, prompt) {
    this.model = model;
    this.answering = model; // for `auto`: what it chose
    this.promptIds = [];
    this.#build(prompt);
    this.tokens = new Tokens(this.output);
    watch(this.output, () => this.answering);
  }

  /** Write and score; resolves whatever happens, throws only where the server wants a key. */
  async run(request, signal) {
    this.began = performance.now();
    const asked = { ...request, model: this.model, logprobs: LIKELIEST, return_token_ids: true };
    let scoring = null;
    try {
      for await (const event of api.stream(asked, signal)) {
        this.#take(event);
        if (this.#waitsForScore(BEFORE_SCORING)) scoring ??= this.#scoreMeanwhile(signal).then(() => (scoring = null));
      }
      await scoring;
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

  #take(event) {
    const [choice] = event.choices;
    if (event.routing && !this.routed) this.#tellRoute(event.routing);
    if (choice.prompt_token_ids) this.promptIds = choice.prompt_token_ids;
    if (choice.token_ids.length) {
      this.firstAt ??= performance.now();
      this.lastAt = performance.now();
    }
    this.tokens.push(choice);
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
    this.note.textContent = `mean ${factor(this.tokens.meanNats)} a token`;
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

  #tellRoute({ model, scores }) {
    this.routed = true;
    this.answering = model in scores ? model : BASE;
    const best = Object.entries(scores).sort(([, a], [, b]) => b - a).slice(0, ROUTES);
    const told = best.map(([name, nats]) => `${name} ${nats < 0 ? "−" : "+"}${Math.abs(nats).toFixed(2)}`);
    const where = document.createElement("strong");
    where.textContent = `→ ${this.answering}`;
    this.route.replaceChildren(where, told.length ? ` by nats a token over the base: ${told.join(", ")}` : " (no adapter here)");
    this.route.hidden = false;
  }

  #say(state) {
    const count = this.tokens.ids.length;
    const told = [state];
    if (count) told.push(`${count} token${count > 1 ? "s" : ""}`);
    const seconds = (this.lastAt - this.firstAt) / 1000;
    if (count > 1 && seconds > 0) told.push(`${((count - 1) / seconds).toFixed(0)}/s`);
    if (this.firstAt) told.push(`${((this.firstAt - this.began) / 1000).toFixed(2)} s to the first`);
    this.status.textContent = told.join(" · ");
  }

  #fail(error) {
    this.#say("failed");
    this.problem.textContent = error.message;
    this.problem.hidden = false;
  }

  #build(prompt) {
    this.element = make("article", "column");
    this.element.dataset.model = this.model;
    this.element.dataset.state = "writing";
    const head = make("div", "head");
    const title = make("h2", "", this.model);
    const copy = make("button", "quiet", "Copy text");
    copy.type = "button";
    copy.addEventListener("click", () => navigator.clipboard.writeText(this.tokens.text));
    head.append(title, copy);
    this.route = make("p", "route");
    this.problem = make("p", "problem");
    this.route.hidden = this.problem.hidden = true;
    this.output = make("div", "output");
    const wanted = { tabIndex: 0, role: "group", ariaLive: "polite", ariaBusy: "true", ariaLabel: `Text of ${this.model}` };
    Object.assign(this.output, wanted);
    this.output.setAttribute("aria-describedby", "hint");
    const before = prompt.length > SHOWN_PROMPT ? `…${prompt.slice(-SHOWN_PROMPT)}` : prompt;
    this.output.append(make("span", "before", before));
    const foot = make("div", "foot");
    this.status = make("p", "status", "waiting");
    this.note = make("p", "note");
    foot.append(this.status, this.note);
    this.element.append(head, this.route, this.output, this.problem, foot);
  }
}

function make(tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.textContent = text;
  return made;
}
