// The widget's elements for one node: status, legend, chart, samples. It shows a Feed; it does not fetch. Text only ever goes in as text.

import { inOrder, panels, reading, sentence, status } from "./curve.mjs";
import { draw } from "./chart.mjs";
import { element, svg, write } from "./dom.mjs";
import { samplesStrip } from "./samples.mjs";

// Kept free from the start, so that a node is as high before a run as after it; a node that is made higher has a larger chart.
export const HEIGHT = 400;
let made = 0;

export class Monitor {
  // `picture(run, folder, file, version)` answers an address.
  constructor({ picture }) {
    Object.assign(this, { picture, feed: null, cursor: null, hidden: new Set(), drawn: null, waiting: false, words: "", offers: null });
    this.clip = `g2rpo-clip-${(made += 1)}`;
    this.build();
    this.observer = new ResizeObserver(() => this.invalidate());
    this.observer.observe(this.chart);
    this.listen();
  }

  build() {
    this.status = element("span", { class: "g2rpo-status" });
    this.run = element("span", { class: "g2rpo-run" });
    this.head = element("div", { class: "g2rpo-head" }, this.status, this.run);
    this.bar = element("div");
    const share = { role: "progressbar", "aria-label": "Share of the run that is done", "aria-valuemin": "0", "aria-valuemax": "100" };
    this.progress = element("div", { class: "g2rpo-progress", ...share }, this.bar);
    this.said = element("div", { class: "g2rpo-saying", role: "status", hidden: true });
    this.alarm = element("div", { class: "g2rpo-alarm", role: "alert", hidden: true });
    this.legend = element("div", { class: "g2rpo-legend", role: "group", "aria-label": "Curves shown" });
    this.drawing = svg("svg", { "aria-hidden": "true" });
    this.note = element("div", { class: "g2rpo-note", role: "status" });
    this.chart = element("div", { class: "g2rpo-chart" }, this.drawing, this.note);
    this.strip = element("div", { class: "g2rpo-samples" });
    this.root = element(
      "div",
      { class: "g2rpo", role: "group", "aria-label": "Training curve" },
      this.head,
      this.progress,
      this.said,
      this.alarm,
      this.legend,
      this.chart,
      this.strip,
    );
    this.buttons = new Map();
    this.stripKey = "";
  }

  listen() {
    this.chart.addEventListener("pointermove", (event) => this.point(this.stepUnder(event)));
    this.chart.addEventListener("pointerleave", () => this.point(null));
    this.chart.addEventListener("blur", () => this.point(null));
    this.chart.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey || !this.move(event.key)) return;
      event.preventDefault();
      event.stopPropagation();
    });
  }

  stepUnder(event) {
    const box = this.chart.getBoundingClientRect();
    const zoom = box.width / this.chart.clientWidth || 1;
    return this.drawn?.stepAt((event.clientX - box.left) / zoom) ?? null;
  }

  // Moves the cursor by a key; says whether the key was one of the cursor's.
  move(key) {
    const steps = this.drawn?.steps ?? [];
    const last = steps.length - 1;
    if (last < 0) return false;
    const here = this.cursor === null ? -1 : steps.indexOf(this.cursor);
    const from = here < 0 ? last + (key === "ArrowLeft" || key === "PageUp" ? 1 : 0) : here;
    const to = { ArrowLeft: from - 1, ArrowRight: from + 1, ArrowDown: from - 1, ArrowUp: from + 1, PageUp: from - 10, PageDown: from + 10, Home: 0, End: last };
    if (key === "Escape" && this.cursor !== null) this.point(null);
    else if (key in to) this.point(steps[Math.max(0, Math.min(last, to[key]))]);
    else return false;
    return true;
  }

  point(step) {
    if (step === this.cursor) return;
    this.cursor = step;
    this.invalidate();
  }

  // Shows another feed, or none with a word on why; `offers` are runs to choose from.
  show(feed, words = "", offers = null) {
    if (feed !== this.feed) {
      this.feed = feed;
      this.cursor = null;
      this.hidden.clear();
    }
    this.words = words;
    this.offers = offers;
    this.invalidate();
  }

  // Tells what the block says: what a run costs, what it goes on from.
  say(words) {
    write(this.said, words);
    this.said.title = words;
    this.said.hidden = !words;
  }

  // Redraws once before the next frame, however often it is called.
  invalidate() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      if (this.root.isConnected) this.render();
    });
  }

  render() {
    const series = this.feed?.series ?? new Map();
    this.renderHead();
    this.renderAlarm();
    this.renderChart(series);
    this.renderLegend(series);
    this.renderNote(series);
    this.renderStrip();
  }

  renderHead() {
    const feed = this.feed;
    const { text, share, running } = feed?.progress || (feed?.loaded && !feed.problem) ? status(feed) : { text: "", share: 0, running: false };
    write(this.status, text);
    this.status.title = text;
    write(this.run, feed?.id ?? "");
    this.run.title = feed ? `output/g2rpo/${feed.id}` : "";
    this.bar.style.width = `${share * 100}%`;
    this.progress.setAttribute("aria-valuenow", String(Math.round(share * 100)));
    this.progress.setAttribute("aria-valuetext", text || "not started");
    this.root.dataset.running = String(running);
    this.head.hidden = this.progress.hidden = !text;
  }

  renderAlarm() {
    const alarm = this.feed?.alarm;
    const text = alarm ? `Alarm at step ${alarm.step}: ${alarm.text}` : "";
    write(this.alarm, text);
    this.alarm.title = text;
    this.alarm.hidden = !text;
  }

  renderChart(series) {
    const { clientWidth: width, clientHeight: height } = this.chart;
    if (!width || !height) return;
    if (this.cursor !== null && ![...series.values()].some((line) => line.steps.includes(this.cursor))) this.cursor = null;
    this.drawn = draw(this.drawing, series, { width, height, hidden: this.hidden, cursor: this.cursor, clip: this.clip });
    this.drawing.style.height = `${this.drawn.whole}px`;
    this.chartAsSlider(series);
  }

  // The chart is a slider over the steps to a screen reader and to the keyboard, once there is something to read.
  chartAsSlider(series) {
    const { steps } = this.drawn;
    if (!steps.length) {
      for (const name of ["role", "tabindex", "aria-valuenow", "aria-valuemin", "aria-valuemax", "aria-valuetext"]) this.chart.removeAttribute(name);
      return;
    }
    const at = this.cursor ?? steps.at(-1);
    const values = { role: "slider", tabindex: 0, "aria-label": "Step to read the curves at", "aria-valuemin": steps[0], "aria-valuemax": steps.at(-1) };
    Object.assign(values, { "aria-valuenow": at, "aria-valuetext": sentence(series, this.hidden, this.cursor, steps.at(-1)) });
    for (const [name, value] of Object.entries(values)) this.chart.setAttribute(name, String(value));
  }

  renderLegend(series) {
    const lines = inOrder(series);
    const key = JSON.stringify(lines.map((line) => line.key));
    if (key !== this.legendKey) this.buildLegend(lines);
    this.legendKey = key;
    for (const line of lines) {
      const button = this.buttons.get(line.key);
      button.setAttribute("aria-pressed", String(!this.hidden.has(line.key)));
      const { value, spread, change } = reading(line, this.cursor);
      button.title = `Show or hide: ${button.ariaLabel}\n${value} ${spread}${change && `, ${change} since the start`}`;
      write(button.querySelector(".g2rpo-value"), value);
      write(button.lastElementChild, change && `Δ ${change}`);
    }
    this.legend.hidden = !lines.length;
  }

  // One row per reward: its name, the button of its training curve, the button of its held-out curve.
  buildLegend(lines) {
    const colours = new Map(panels(this.feed?.series ?? new Map()).map((panel) => [panel.name, panel.colour]));
    this.buttons = new Map(lines.map((line) => [line.key, this.makeButton(line)]));
    const rows = [...new Set(lines.map((line) => line.name))].map((name) => {
      const own = ["reward", "heldout"].map((kind) => this.buttons.get(`${kind}/${name}`) ?? element("span"));
      const row = element("div", { class: "g2rpo-row" }, element("span", { class: "g2rpo-name", title: name }, name), ...own);
      row.style.setProperty("--g2rpo-colour", colours.get(name) ?? "gray");
      return row;
    });
    this.legend.replaceChildren(...rows);
  }

  makeButton(line) {
    const swatch = element("span", { class: "g2rpo-swatch", "data-kind": line.kind });
    const label = line.kind === "heldout" ? line.label : `training reward ${line.label}`;
    const named = { type: "button", "aria-label": label, "data-series": line.key };
    const words = line.kind === "heldout" ? [element("span", { class: "g2rpo-kind" }, "held-out")] : [];
    const change = element("span", { class: "g2rpo-change" });
    const button = element("button", named, swatch, ...words, element("span", { class: "g2rpo-value" }), change);
    button.addEventListener("click", () => {
      if (!this.hidden.delete(line.key)) this.hidden.add(line.key);
      this.invalidate();
    });
    return button;
  }

  renderNote(series) {
    const feed = this.feed;
    const waiting = feed && !feed.problem && (feed.loaded ? "No rewards measured yet." : "Reading the run …");
    const hiddenAll = series.size > 0 && !this.drawn?.steps.length ? "All curves are hidden." : "";
    const words = series.size ? hiddenAll : feed?.problem || waiting || this.words;
    this.note.hidden = !words && !this.offers?.length;
    const key = JSON.stringify([words, this.offers?.map((offer) => offer.label)]);
    if (key === this.noteKey) return;
    this.noteKey = key;
    const buttons = (feed ? [] : this.offers ?? []).map((offer) => {
      const button = element("button", { type: "button" }, offer.label);
      button.addEventListener("click", offer.choose);
      return button;
    });
    this.note.replaceChildren(element("span", {}, words), ...buttons);
  }

  renderStrip() {
    const { id, samples = [], created } = this.feed ?? {};
    this.strip.hidden = samples.length === 0;
    const key = JSON.stringify([id, created, samples.map((sample) => [sample.step, sample.files.length])]);
    if (key === this.stripKey) return;
    this.stripKey = key;
    const before = this.strip.querySelector(".g2rpo-strip")?.scrollLeft ?? 0;
    this.strip.replaceChildren(...samplesStrip(samples, (folder, file) => this.picture(id, folder, file, created), () => this.strip));
    this.strip.querySelector(".g2rpo-strip")?.scrollTo({ left: before });
  }

  dispose() {
    this.observer.disconnect();
  }
}
