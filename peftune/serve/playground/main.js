// The page: models to choose from, run and stop, and an address that brings all of it back.

import * as api from "./api.js";
import { Column } from "./column.js";
import * as details from "./details.js";
import * as settings from "./settings.js";

const at = (id) => document.getElementById(id);
const MANY = 12; // models from which on a filter helps
let running = null; // the AbortController of what is being written
let wished = null; // models that the address names, until the server has told which there are
const said = new Map(); // the conversation with each model: messages as the API has them

/** Ask for the models and tick `wanted`; without a wish the base and the first adapters. */
async function showModels(wanted) {
  wished = wanted;
  let cards;
  try {
    cards = await api.models();
  } catch (error) {
    tell(error);
    return;
  }
  tell(null);
  const base = cards.find((card) => card.parent === null);
  at("base").textContent = `on ${base.id}, ${base.max_model_len} positions`;
  const adapters = cards.filter((card) => card !== base);
  const offered = [
    { id: "base", note: "no adapter" },
    ...(adapters.length ? [{ id: "auto", note: "the best for the prompt", chat: adapters.some((card) => card.chat) }] : []),
    ...adapters.map(({ id, rank, chat }) => ({ id, note: chat ? `rank ${rank}, chat` : `rank ${rank}`, chat })),
  ];
  const ticked = wanted ?? ["base", ...adapters.slice(0, 2).map((card) => card.id)];
  at("models").replaceChildren(...offered.map((model) => choiceOf(model, ticked.includes(model.id))));
  at("filter").hidden = offered.length < MANY;
  filter();
  at("modes").hidden = !adapters.some((card) => card.chat);
  if (at("modes").hidden) settings.choose("text");
  showMode();
  const missing = ticked.filter((name) => !offered.some((model) => model.id === name));
  at("missing").hidden = missing.length === 0;
  at("missing").textContent = `Not on this server: ${missing.join(", ")}`;
}

function choiceOf({ id, note, chat = false }, checked) {
  const label = document.createElement("label");
  const box = Object.assign(document.createElement("input"), { type: "checkbox", name: "model", value: id, checked });
  box.dataset.chat = chat;
  const name = Object.assign(document.createElement("span"), { textContent: id });
  label.append(box, name, Object.assign(document.createElement("small"), { textContent: note }));
  return label;
}

function chosen() {
  if (!at("models").children.length) return wished ?? [];
  return [...at("models").querySelectorAll("input:checked:enabled")].map((box) => box.value);
}

/** Only adapters that were trained on conversations can chat. */
function showMode() {
  const chat = settings.mode() === "chat";
  document.body.dataset.mode = settings.mode();
  for (const box of at("models").querySelectorAll("input")) box.disabled = chat && box.dataset.chat !== "true";
  at("prompt-label").textContent = chat ? "Your message" : "Prompt";
  at("forget").hidden = !chat || said.size === 0;
  showCount();
}

function showCount() {
  const boxes = at("models").querySelectorAll("input:enabled");
  at("count").textContent = boxes.length ? `${chosen().length} of ${boxes.length} chosen` : "";
  at("clear").hidden = chosen().length === 0;
}

function filter() {
  const wanted = at("filter").value.toLowerCase();
  for (const label of at("models").children) label.hidden = !label.textContent.toLowerCase().includes(wanted);
}

function clear() {
  for (const box of at("models").querySelectorAll("input:checked:enabled")) box.checked = false;
  showCount();
  save();
}

function forget() {
  said.clear();
  at("columns").replaceChildren();
  delete document.body.dataset.ran;
  showMode();
  at("prompt").focus();
}

async function run() {
  const models = chosen();
  if (!at("form").reportValidity()) return;
  if (!models.length) {
    tell(new Error(settings.mode() === "chat" ? "Choose at least one adapter that can chat." : "Choose at least one model."));
    return;
  }
  tell(null);
  save();
  details.close();
  running?.abort();
  const mine = (running = new AbortController());
  const request = settings.request();
  const chat = settings.mode() === "chat";
  const turn = { role: "user", content: request.prompt };
  const columns = models.map((model) => new Column(model, request.prompt, chat ? [...(said.get(model) ?? []), turn] : null));
  at("columns").replaceChildren(...columns.map((column) => column.element));
  document.body.dataset.ran = "";
  setRunning(true);
  if (matchMedia("(max-width: 859px)").matches) at("results").scrollIntoView();
  const ended = await Promise.allSettled(columns.map((column) => column.run(request, mine.signal)));
  const refused = ended.find((one) => one.status === "rejected");
  if (refused) tell(refused.reason);
  if (chat) remember(columns);
  if (running === mine) setRunning(false);
}

/** What was answered is part of the conversation; a message that nobody answered stays where it was typed. */
function remember(columns) {
  const answered = columns.filter((column) => column.answer);
  for (const { model, messages, answer } of answered) said.set(model, [...messages, { role: "assistant", content: answer }]);
  if (answered.length) at("prompt").value = "";
  save();
  showMode();
}

function stop() {
  running?.abort();
}

function setRunning(on) {
  if (!on) running = null;
  at("run").textContent = on ? "Stop" : "Run";
  document.body.toggleAttribute("data-running", on);
}

/** One line for a person; a server that wants a key gets a field for it. */
function tell(error) {
  at("problem").textContent = error?.message ?? "";
  if (error?.status === 401) {
    at("key-row").hidden = false;
    at("key").focus();
  }
}

function save() {
  settings.toAddress(chosen());
}

function load() {
  return showModels(settings.fromAddress());
}

function onInput(event) {
  if (event.target === at("key")) return;
  if (event.target === at("filter")) return filter();
  if (event.target.name === "mode") showMode();
  if (event.target.name === "model") showCount();
  settings.mirror(event.target);
  save();
}

function onKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape" && details.isOpen()) {
    details.close();
  } else if (event.key === "Escape") {
    stop();
  }
}

async function copyLink() {
  save();
  await navigator.clipboard.writeText(location.href).then(
    () => (at("copy-link").textContent = "Copied"),
    () => (at("copy-link").textContent = "Copy it from the address bar"), // not allowed here, as without https
  );
  setTimeout(() => (at("copy-link").textContent = "Copy link"), 2000);
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (document.activeElement === at("key")) return; // Enter there means the key
  if (running) stop();
  else run();
});
at("form").addEventListener("input", onInput);
at("key").addEventListener("change", () => {
  api.key.set(at("key").value);
  load();
});
at("dice").addEventListener("click", () => {
  settings.rollSeed();
  save();
});
at("clear").addEventListener("click", clear);
at("forget").addEventListener("click", forget);
at("refresh").addEventListener("click", () => showModels(chosen()));
at("copy-link").addEventListener("click", copyLink);
document.addEventListener("keydown", onKey);
document.addEventListener("scroll", details.follow, { passive: true, capture: true });
window.addEventListener("hashchange", load);
at("sampling").open = matchMedia("(min-width: 860px)").matches;
load();
