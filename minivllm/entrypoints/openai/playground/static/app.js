// Puts the page together: tabs, theme, key, models.

import { Chat, Completion } from "./chat.js";
import { EngineView } from "./engine.js";
import { Knobs } from "./knobs.js";
import { Server } from "./stream.js";

const KEY = "minivllm.key"; // in sessionStorage: gone with the tab
const THEME = "minivllm.theme";
const STARTERS = ["Hello!", "What is 27 + 45?", "Tell me a story about a fox."];

const byId = (id) => document.getElementById(id);

// --- key ---

const dialog = byId("key-dialog");
const server = new Server(document.baseURI, () => sessionStorage.getItem(KEY) ?? "", askForKey);

function askForKey(words) {
  byId("key-words").textContent = words;
  byId("key-title").textContent = words ? "This server asks for a key" : "The key for this server";
  if (dialog.open) return;
  byId("key-input").value = sessionStorage.getItem(KEY) ?? "";
  dialog.showModal();
  byId("key-input").select();
}

byId("show-key").addEventListener("click", () => askForKey(""));
byId("key-cancel").addEventListener("click", () => dialog.close());
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key-input").value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  dialog.close();
  listModels();
  engine.restart();
});

// --- models ---

const model = byId("model");

async function listModels() {
  try {
    const { data } = await (await server.call("v1/models")).json();
    const chosen = model.value;
    model.replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === chosen)));
  } catch (error) {
    model.replaceChildren(new Option(error.message, ""));
  }
}

// --- tabs ---

const tabs = [...document.querySelectorAll("[role=tab]")];
const wide = matchMedia("(min-width: 960px)"); // as in style.css: the engine then stands beside the others
let current = "chat";

const panelOf = (tab) => byId(tab.getAttribute("aria-controls"));
const nameOf = (tab) => tab.id.slice("tab-".length);

function show(name) {
  current = wide.matches && name === "engine" ? "chat" : name;
  for (const tab of tabs) {
    const isCurrent = nameOf(tab) === current;
    tab.setAttribute("aria-selected", String(isCurrent));
    tab.tabIndex = isCurrent ? 0 : -1;
    panelOf(tab).hidden = !isCurrent && !(wide.matches && nameOf(tab) === "engine");
  }
  engine.look();
  engine.draw();
}

for (const tab of tabs) {
  tab.addEventListener("click", () => show(nameOf(tab)));
  tab.addEventListener("keydown", (event) => {
    const reachable = tabs.filter((other) => other.offsetParent !== null);
    const steps = { ArrowRight: 1, ArrowLeft: -1 };
    let next = reachable[(reachable.indexOf(tab) + (steps[event.key] ?? 0) + reachable.length) % reachable.length];
    if (event.key === "Home") next = reachable[0];
    if (event.key === "End") next = reachable.at(-1);
    if (next === tab) return;
    event.preventDefault();
    show(nameOf(next));
    next.focus();
  });
}
wide.addEventListener("change", () => show(current));

// --- theme ---

const THEMES = { auto: "Auto", light: "Light", dark: "Dark" };

function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  byId("theme").textContent = THEMES[name];
  byId("theme").setAttribute("aria-label", `Theme: ${THEMES[name]}`);
  engine.draw();
}

byId("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(localStorage.getItem(THEME) ?? "auto") + 1) % names.length];
  localStorage.setItem(THEME, next);
  setTheme(next);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => engine.draw());

// --- all together ---

const engine = new EngineView(server);
const knobs = new Knobs(byId("knobs-form"), byId("knobs-summary"));
const parts = { server, knobs, model: () => model.value };
const chat = new Chat(parts);
new Completion(parts);

byId("knobs-reset").addEventListener("click", () => knobs.reset());
byId("starters").append(
  ...STARTERS.map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => chat.say(text));
    return button;
  }),
);

setTheme(localStorage.getItem(THEME) in THEMES ? localStorage.getItem(THEME) : "auto");
show("chat");
listModels();
