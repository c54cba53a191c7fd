// A text as it is written, token by token, each with how likely the adapter and the base found it.

const STEPS = [1.5, 3, 10, 100].map(Math.log); // the legend's scale, in nats

/**
 * The tokens of one text, shown as spans in `place`. A character of several tokens is one span: its log-probabilities
 * add up. Offsets count code points, as the server does.
 */
export class Tokens {
  constructor(place) {
    this.place = place;
    this.ids = [];
    this.groups = [];
    this.characters = [];
    this.scored = 0;
    this.open = 0; // groups before this one have their whole text
  }

  /** Take what one event brings: text, token ids and legacy log-probabilities. */
  push(choice) {
    this.ids.push(...choice.token_ids);
    this.characters.push(...choice.text);
    const { tokens, token_logprobs, top_logprobs, text_offset } = choice.logprobs;
    tokens.forEach((text, i) => this.#add({ text, nats: token_logprobs[i], top: top_logprobs[i] }, text_offset[i]));
    this.#show();
  }

  /** The base's log-probabilities of the first tokens, in the same shape. */
  compare({ token_logprobs, top_logprobs }) {
    const tokens = this.groups.flatMap((group) => group.tokens);
    token_logprobs.forEach((nats, i) => (tokens[i].base = { nats, top: top_logprobs[i] }));
    this.scored = token_logprobs.length;
    this.groups.forEach(colour);
  }

  get text() {
    return this.characters.join("");
  }

  /** Mean over the scored tokens of the nats by which the adapter raised them; null before there is any. */
  get meanNats() {
    const known = this.groups.flatMap((group) => group.tokens).filter((token) => token.base);
    return known.length ? known.reduce((sum, token) => sum + token.nats - token.base.nats, 0) / known.length : null;
  }

  #add(token, offset) {
    this.first ??= offset;
    const start = offset - this.first;
    const last = this.groups.at(-1);
    if (last?.start === start) last.tokens.push(token);
    else this.groups.push({ start, tokens: [token], span: null });
  }

  #show() {
    for (let i = this.open; i < this.groups.length && this.groups[i].start < this.characters.length; i++) {
      const group = this.groups[i];
      const end = this.groups[i + 1]?.start ?? Infinity;
      group.span ??= this.place.appendChild(spanOf(group));
      group.span.textContent = this.characters.slice(group.start, end).join("");
      group.span.classList.toggle("line", /^[\r\n]/.test(group.span.textContent));
      colour(group);
      if (end <= this.characters.length) this.open = i + 1;
    }
  }
}

const groupOf = new WeakMap();

/** The group that a span shows, or undefined. */
export const groupShownBy = (span) => groupOf.get(span);

/** Nats by which the adapter raised a group, null before the base has been asked. */
export function natsRaised(group) {
  return group.tokens.every((token) => token.base)
    ? group.tokens.reduce((sum, token) => sum + token.nats - token.base.nats, 0)
    : null;
}

function spanOf(group) {
  const span = document.createElement("span");
  span.className = "token";
  groupOf.set(span, group);
  return span;
}

function colour(group) {
  const nats = natsRaised(group);
  if (nats === null || !group.span || group.span.dataset.nats) return;
  const level = STEPS.filter((step) => step <= Math.abs(nats)).length;
  group.span.dataset.nats = nats.toFixed(4);
  group.span.classList.add(level === 0 ? "same" : `${nats > 0 ? "up" : "down"}-${level}`);
}
