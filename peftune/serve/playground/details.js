// What is known of one token, beside it: both probabilities, their ratio, and what else was likely there.

import { groupShownBy, natsRaised } from "./tokens.js";

const box = document.getElementById("details");
const spoken = document.getElementById("spoken");
let shown = null; // the span that the box speaks of
let pinned = false;

/** Wire one column's output: pointing, tapping, and the arrow keys. `name()` is the model that wrote it. */
export function watch(output, name) {
  output.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && !pinned) show(event.target, name());
  });
  output.addEventListener("pointerleave", () => pinned || close());
  output.addEventListener("click", (event) => {
    pinned = false;
    show(event.target, name());
    pinned = shown !== null;
  });
  output.addEventListener("keydown", (event) => {
    const next = step(event, [...output.querySelectorAll(".token")]);
    if (!next) return;
    event.preventDefault();
    pinned = false;
    show(next, name());
    pinned = true;
    next.scrollIntoView({ block: "nearest" });
    spoken.textContent = sentence(groupShownBy(next), name());
  });
  output.addEventListener("blur", close);
}

export function isOpen() {
  return shown !== null;
}

/** Stay beside the token while the page moves. */
export function follow() {
  if (shown) place(shown);
}

export function close() {
  shown?.classList.remove("chosen");
  shown = null;
  pinned = false;
  box.hidden = true;
}

export const percent = (nats) => {
  const share = 100 * Math.exp(nats);
  if (share < 0.01) return "< 0.01 %";
  return `${share < 10 ? share.toPrecision(2) : Math.round(share)} %`;
};

/** 4.0 for nats of either sign. */
const times = (nats) => {
  const found = Math.exp(Math.abs(nats));
  return found >= 1000 ? found.toExponential(0) : found >= 10 ? Math.round(found) : found.toFixed(1);
};

/** ×4.0 or ÷4.0 for nats. */
export const factor = (nats) => `${nats < 0 ? "÷" : "×"}${times(nats)}`;

/** The same in words, as the end of a sentence. */
export const inWords = (nats) => {
  if (times(nats) === "1.0") return "as likely as";
  return `${times(nats)} times ${nats < 0 ? "less likely than" : "likelier than"}`;
};

function step(event, spans) {
  const at = spans.indexOf(shown);
  const to = { ArrowRight: at + 1, ArrowLeft: at < 0 ? spans.length - 1 : at - 1, Home: 0, End: spans.length - 1 }[event.key];
  return to === undefined ? null : spans[Math.max(0, Math.min(to, spans.length - 1))];
}

function show(span, name) {
  const group = groupShownBy(span);
  close();
  if (!group) return;
  shown = span;
  span.classList.add("chosen");
  box.replaceChildren(...contents(group, span.textContent, name));
  box.hidden = false;
  place(span);
}

/** Below the token, above it where there is no room below; on narrow screens the style puts it at the bottom. */
function place(span) {
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = box;
  const below = at.bottom + 6;
  const top = below + height < innerHeight ? below : Math.max(6, at.top - height - 6);
  box.style.left = `${Math.max(6, Math.min(at.left, document.documentElement.clientWidth - width - 6))}px`;
  box.style.top = `${top}px`;
}

function contents(group, text, name) {
  const nats = natsRaised(group);
  const title = element("p", "title", visible(text));
  const rows = [[name, sum(group, (token) => token.nats)]];
  if (nats !== null) rows.push(["base", sum(group, (token) => token.base.nats)]);
  const table = element("dl");
  for (const [who, found] of rows) table.append(element("dt", "", who), element("dd", "", percent(found)));
  if (nats !== null) {
    table.append(element("dt", "", "ratio"), element("dd", "", `${factor(nats)} (${signed(nats)} nats)`));
  }
  const first = group.tokens[0];
  const lists = element("div", "others");
  lists.append(others(`${name}, likeliest`, first.top));
  if (first.base) lists.append(others("base, likeliest", first.base.top));
  return [title, table, lists];
}

function others(title, top) {
  const list = element("ol");
  const best = Object.entries(top).sort(([, a], [, b]) => b - a).slice(0, 5);
  for (const [text, nats] of best) {
    const item = element("li");
    item.append(element("span", "text", visible(text)), element("span", "", percent(nats)));
    list.append(item);
  }
  const part = element("section");
  part.append(element("h3", "", title), list);
  return part;
}

function sentence(group, name) {
  const nats = natsRaised(group);
  const own = `${visible(group.span.textContent)}: ${percent(sum(group, (token) => token.nats))} under ${name}`;
  if (nats === null) return own;
  return `${own}, ${percent(sum(group, (token) => token.base.nats))} under the base, ${nats < 0 ? "lowered" : "raised"} ${factor(nats)}`;
}

const sum = (group, of) => group.tokens.reduce((total, token) => total + of(token), 0);

const signed = (nats) => `${nats < 0 ? "−" : "+"}${Math.abs(nats).toFixed(2)}`;

/** White space as signs, so that it can be seen. */
const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "(nothing)";

function element(tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.textContent = text;
  return made;
}
