// The sampling fields: what a request says beyond its prompt. An empty field is not sent.

const KNOBS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, slider: true },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.01, slider: true, rest: 1 },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, slider: true, rest: 0 },
  { name: "top_k", label: "Top k", min: 0, step: 1 },
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, value: "512" },
  { name: "seed", label: "Seed", step: 1 },
  { name: "presence_penalty", label: "Presence", title: "Presence penalty", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", label: "Frequency", title: "Frequency penalty", min: -2, max: 2, step: 0.1 },
  { name: "repetition_penalty", label: "Repetition", title: "Repetition penalty", min: 0.05, max: 2, step: 0.05 },
];

export class Knobs {
  constructor(form, summary) {
    this.form = form;
    this.summary = summary;
    form.append(...KNOBS.map((knob) => this.#field(knob)));
    form.append(this.#text("stop", "Stop at", "a text on each line"), this.#text("system", "System message (chat)", ""));
    form.addEventListener("input", () => this.#summarize());
    form.addEventListener("submit", (event) => event.preventDefault());
    this.reset();
  }

  reset() {
    for (const knob of KNOBS) this.#input(knob.name).value = knob.value ?? "";
    this.#input("stop").value = this.#input("system").value = "";
    for (const slider of this.form.querySelectorAll("[type=range]")) slider.value = slider.dataset.rest;
    this.#summarize();
  }

  /** The fields of a request. Throws an Error that names the field which holds no number in its range. */
  params() {
    const params = {};
    for (const { name, label } of KNOBS) {
      const input = this.#input(name);
      if (!input.validity.valid) throw new Error(`${label}: ${input.validationMessage}`);
      if (input.value !== "") params[name] = Number(input.value);
    }
    const stop = this.#input("stop").value.split("\n").filter(Boolean);
    if (stop.length) params.stop = stop;
    return params;
  }

  get system() {
    return this.#input("system").value.trim();
  }

  #input(name) {
    return this.form.querySelector(`#knob-${name}`);
  }

  #label(name, label) {
    const element = document.createElement("label");
    element.htmlFor = `knob-${name}`;
    element.textContent = label;
    return element;
  }

  #field({ name, label, title, min, max, step, slider, rest = 1 }) {
    const field = document.createElement("div");
    field.className = slider ? "knob sliding" : "knob";
    const input = document.createElement("input");
    Object.assign(input, { id: `knob-${name}`, type: "number", placeholder: "default", inputMode: "decimal" });
    if (title) input.ariaLabel = input.title = title;
    if (min !== undefined) input.min = min;
    if (max !== undefined) input.max = max;
    input.step = slider ? "any" : step;
    const pair = document.createElement("div");
    pair.className = "pair";
    pair.append(input);
    if (slider) {
      const range = document.createElement("input");
      Object.assign(range, { type: "range", min, max, step, value: rest, tabIndex: -1 }); // the number beside it is reachable
      range.dataset.rest = rest;
      range.setAttribute("aria-hidden", "true");
      range.addEventListener("input", () => (input.value = range.value));
      input.addEventListener("input", () => (range.value = input.value === "" ? rest : input.value));
      pair.append(range);
    }
    field.append(this.#label(name, label), pair);
    return field;
  }

  #text(name, label, placeholder) {
    const field = document.createElement("div");
    field.className = "knob wide";
    const area = document.createElement("textarea");
    Object.assign(area, { id: `knob-${name}`, rows: 2, placeholder });
    field.append(this.#label(name, label), area);
    return field;
  }

  #summarize() {
    const said = KNOBS.filter(({ name }) => this.#input(name).value !== "").map(
      ({ name, label }) => `${label.toLowerCase()} ${this.#input(name).value}`,
    );
    if (this.#input("stop").value.trim()) said.push("stops");
    if (this.system) said.push("a system message");
    this.summary.textContent = said.join(" · ");
  }
}
