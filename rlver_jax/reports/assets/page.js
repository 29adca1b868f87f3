"use strict";
// The dialogue browser, and what a touched chart says. Whatever models wrote becomes text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";
const SHOWN = 100; // dialogues that the list adds at a time
const $ = (selector) => document.querySelector(selector);

function make(tag, attributes = {}, ...children) {
  const drawn = ["svg", "path", "line"].includes(tag);
  const element = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

for (const kind of ["pointermove", "pointerdown"]) {
  document.addEventListener(kind, (event) => {
    const tip = event.target.dataset?.tip;
    if (tip) event.target.closest("figure").querySelector("output").textContent = tip;
  });
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// An emotion as far as a drawing shows it; in logs of RLVER it may be below 0.
const bounded = (emotion) => Math.min(Math.max(emotion, 0), 100);

function sparkline(emotions, classes, tip) {
  const x = (i) => (i / Math.max(emotions.length - 1, 1)) * 70 + 1;
  const y = (emotion) => 29 - bounded(emotion) * 0.28;
  const path = "M" + emotions.map((emotion, i) => `${x(i)} ${y(emotion)}`).join("L");
  const keep = { "vector-effect": "non-scaling-stroke" };
  return make("svg", { class: `spark ${classes}`, viewBox: "0 0 72 30", preserveAspectRatio: "none", role: "img",
    "aria-label": tip },
    make("line", { class: "grid", x1: 0, x2: 72, y1: 1, y2: 1, ...keep }),
    make("line", { class: "grid", x1: 0, x2: 72, y1: 29, y2: 29, ...keep }),
    make("path", { class: "line", d: path, ...keep }));
}

class Browser {
  constructor(data) {
    Object.assign(this, data);
    this.dialogues.forEach((dialogue, index) => { dialogue.index = index; });
    this.byProfile = new Map();
    for (const d of this.dialogues) {
      if (!this.byProfile.has(d.who)) this.byProfile.set(d.who, []);
      this.byProfile.get(d.who).push(d);
    }
    this.filters = {};
    this.makeFilters();
    this.makeTools();
    this.filter();
    const pair = this.pairs()[0];
    if (pair) this.show(pair[1], pair[0]);
    else this.show(this.dialogues[0], null);
  }

  name(d) {
    const run = this.runs.length > 1 || d.step === null ? this.runs[d.run] : "";
    return [run, d.step === null ? "" : `step ${d.step}`].filter(Boolean).join(" · ");
  }

  pairs() { // [first, last] of every profile that was met by more than one policy; of one run where it can be
    const same = (a, b) => a.run === b.run && a.step === b.step;
    return [...this.byProfile.values()].map((all) => {
      const last = all.at(-1);
      const first = all.find((d) => d.run === last.run);
      return [same(first, last) ? all[0] : first, last];
    }).filter(([first, last]) => !same(first, last));
  }

  select(key, label, options) { // options: [value, text]
    const select = make("select", {}, make("option", { value: "" }, "all"),
      ...options.map(([value, text]) => make("option", { value }, text)));
    select.name = key;
    select.onchange = () => this.filter();
    this.filters[key] = select;
    return make("label", {}, label, select);
  }

  makeFilters() {
    const distinct = (of) => [...new Set(this.dialogues.map(of))];
    const steps = distinct((d) => d.step).filter((step) => step !== null).sort((a, b) => a - b);
    const search = make("input", { type: "search", name: "search", autocomplete: "off" });
    let waiting;
    search.oninput = () => { clearTimeout(waiting); waiting = setTimeout(() => this.filter(), 150); };
    this.filters.search = search;
    const form = $(".filters");
    form.onsubmit = (event) => event.preventDefault();
    const labels = [
      this.runs.length > 1 ? this.select("run", "run", this.runs.map((name, i) => [i, name])) : null,
      steps.length > 1 ? this.select("step", "step", steps.map((step) => [step, step])) : null,
      this.select("intention", "hidden intention", this.intentions.map((name, i) => [i, name])),
      this.select("outcome", "outcome", this.outcomes.map((name, i) => [i, name])),
      this.select("end", "ended by", distinct((d) => d.end).sort().map((name) => [name, name.replaceAll("_", " ")])),
      make("label", {}, "words", search)];
    form.append(...labels.filter(Boolean));
  }

  makeTools() {
    const pairs = this.pairs();
    this.compare = make("select", { name: "compare" });
    this.compare.onchange = () => this.show(this.shown, this.dialogues[this.compare.value] ?? null);
    const brief = make("input", { type: "checkbox", name: "brief" });
    brief.onchange = () => $(".panes").classList.toggle("brief", brief.checked);
    const next = make("button", { type: "button", name: "next" }, "next profile, before and after");
    next.onclick = () => {
      const at = pairs.findIndex(([, last]) => last.who === this.shown.who);
      const [first, last] = pairs[(at + 1) % pairs.length];
      this.show(last, first);
    };
    $(".tools").append(make("label", {}, make("small", {}, "beside it: the same profile in "), this.compare),
      ...(pairs.length ? [next] : []), make("label", { class: "check" }, brief, "only what was said"));
  }

  text(d) { // lower case, made when it is first searched
    d.text ??= [d.profile, d.hidden, ...d.messages.flatMap((m) => [m.user, m.thought, m.say,
      ...[...(m.appraisal ?? []), ...(m.considered ?? [])].map((note) => note[1])])].join("\n").toLowerCase();
    return d.text;
  }

  filter() {
    const words = this.filters.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = Object.entries(this.filters).filter(([key, field]) => key !== "search" && field.value !== "");
    this.found = this.dialogues.filter((d) => wanted.every(([key, field]) => String(d[key]) === field.value)
      && words.every((word) => this.text(d).includes(word)));
    $("#count").textContent = `${this.found.length} of ${this.dialogues.length} dialogues`;
    $(".list").replaceChildren();
    this.more();
  }

  more() {
    const list = $(".list");
    const start = list.children.length;
    list.append(...this.found.slice(start, start + SHOWN).map((d) => this.entry(d)));
    if (list.children.length < this.found.length) {
      const button = make("button", { type: "button", class: "more" }, `${this.found.length - list.children.length} more`);
      const item = make("li", {}, button);
      button.onclick = () => { item.remove(); this.more(); };
      list.append(item);
    }
    this.mark();
  }

  entry(d) {
    const path = `${d.emotions[0]} → ${d.emotions.at(-1)}`;
    const button = make("button", { type: "button", "data-index": d.index },
      sparkline(d.emotions, this.outcomes[d.outcome], `emotion ${path}`),
      make("b", { dir: "auto" }, `${path}  ${d.profile}`),
      make("small", {}, [this.name(d), this.intentions[d.intention], d.end.replaceAll("_", " ")].join(" · ")));
    button.onclick = () => {
      this.show(d, null);
      if (matchMedia("(max-width: 760px)").matches) $(".tools").scrollIntoView();
    };
    return make("li", {}, button);
  }

  mark() {
    for (const button of document.querySelectorAll(".list button[data-index]")) {
      button.setAttribute("aria-current", Number(button.dataset.index) === this.shown?.index);
    }
  }

  show(d, other) {
    this.shown = d;
    const others = this.byProfile.get(d.who).filter((one) => one !== d);
    this.compare.replaceChildren(
      make("option", { value: "" }, others.length ? "– nothing –" : "no other dialogue"),
      ...others.map((one) => make("option", { value: one.index }, `${this.name(one)}, ${one.emotions.at(-1)} at the end`)));
    this.compare.value = other?.index ?? "";
    this.compare.disabled = !others.length;
    const both = other && other.index < d.index ? [other, d] : [d, other];
    $(".panes").replaceChildren(...both.filter(Boolean).map((one) => this.article(one)));
    this.mark();
  }

  article(d) {
    const outcome = this.outcomes[d.outcome];
    const change = d.emotions.at(-1) - d.emotions[0];
    const head = [make("h3", {}, this.name(d) || this.runs[d.run]),
      make("p", {}, make("small", { dir: "auto" }, `${d.profile}, dialogue ${d.number}`)),
      make("p", { dir: "auto" }, make("small", {}, "hidden intention  "), d.hidden),
      make("p", {}, make("span", { class: `tag ${outcome}` }, outcome),
        d.end === outcome ? null : make("span", { class: "tag" }, d.end.replaceAll("_", " ")), make("span", { class: "tag" }, `reward ${d.reward}`)),
      sparkline(d.emotions, `large ${outcome}`, `emotion ${d.emotions.join(", ")}`),
      make("small", {}, `emotion ${d.emotions[0]} → ${d.emotions.at(-1)} (`, this.signed(change), ")")];
    let turn = 0;
    const body = d.messages.flatMap((m) => {
      if ("skipped" in m) {
        turn += m.skipped;
        return [make("p", { class: "turn" }, `[…${m.skipped.toLocaleString("en")} turns left out…]`)];
      }
      if ("say" in m) return [make("p", { class: "turn" }, `turn ${++turn}`), this.policy(m)];
      return [this.user(m)];
    });
    return make("article", {}, ...head, ...body);
  }

  policy(m) {
    return make("div", { class: "policy" },
      m.thought ? make("div", { class: "thought", dir: "auto" }, m.thought) : null,
      make("div", { class: "say", dir: "auto" }, make("span", { class: "who" }, "policy"), m.say),
      m.violation ? make("p", { class: "down" }, "broke the think format") : null);
  }

  user(m) {
    const notes = (list) => list?.length ? make("div", { class: "notes", dir: "auto" },
      ...list.flatMap(([name, text], i) => [make("b", {}, `${i ? "\n" : ""}${name}  `), text])) : null;
    const level = make("i", { class: m.emotion >= 100 ? "success" : m.emotion < 10 ? "failure" : "c0" });
    level.style.width = `${bounded(m.emotion)}%`;
    return make("div", { class: "user" }, notes(m.appraisal),
      make("div", { class: "meter" }, make("span", { class: "gauge" }, level), `emotion ${m.emotion}`,
        "change" in m ? this.signed(m.change) : null),
      notes(m.considered),
      m.user ? make("div", { class: "say", dir: "auto" }, make("span", { class: "who" }, "user"), m.user) : null);
  }

  signed(change) {
    const text = change > 0 ? `+${change}` : `${change}`.replace("-", "−");
    return make("span", { class: change > 0 ? "up" : change < 0 ? "down" : "" }, text);
  }
}

const packed = $("#dialogues").textContent;
if (packed) {
  unpack(packed).then((data) => { window.browser = new Browser(data); }, (error) => {
    $("#count").textContent = `The dialogues cannot be unpacked (${error}); a browser of 2023 or newer can.`;
  });
}
