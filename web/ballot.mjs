// Votes on one group of pictures: what is clicked becomes a ranking or pairs, and both become votes as comfy_g2rpo/votes.py reads them.
// Used by the block Vote (vote.mjs) and by the page that `g2rpo vote` writes (vote_page.mjs), so nothing in here knows ComfyUI.

import { element, write } from "./dom.mjs";

// Room for twelve pictures, kept free from the start; of more, all are smaller.
export const BALLOT_HEIGHT = 450;
const GAP = 6;
const MIN_TILE = 72;
const MODES = { rank: "Rank", pairs: "Pairs" };

// Every key of a ballot, in words.
export const KEYS = "Keys: 1–9 and 0 choose a picture · arrows move · Enter or space chooses · Backspace takes back";

// What somebody thinks of the pictures named by `keys`. No page in here, so that Node can test it.
export class Opinion {
  constructor(keys, votes = null) {
    Object.assign(this, { keys, mode: "rank", ranking: [], pairs: [], half: null, restLoses: true });
    if (votes) this.take(votes);
  }

  // Takes votes back up; those on other pictures are no votes on these.
  take(votes) {
    if (!sameGroup(this.keys, votes)) return;
    const known = (key) => this.keys.includes(key);
    this.ranking = (votes.ranking?.length ? votes.ranking : votes.winners ?? []).filter(known);
    this.pairs = (votes.pairs ?? []).filter((pair) => pair.length === 2 && pair.every(known));
    this.restLoses = this.ranking.length === 0 || (votes.winners ?? []).length > 0 || this.ranking.length === this.keys.length;
    this.mode = this.pairs.length && !this.ranking.length ? "pairs" : "rank";
  }

  // The best is chosen first; in pairs, the better one of two. Choosing what is chosen takes it back.
  pick(key) {
    if (!this.keys.includes(key)) return;
    if (this.mode === "rank") {
      const at = this.ranking.indexOf(key);
      if (at < 0) this.ranking.push(key);
      else this.ranking.splice(at, 1);
    } else if (this.half === null) this.half = key;
    else {
      if (this.half !== key) this.pairs.push([this.half, key]);
      this.half = null;
    }
  }

  undo() {
    if (this.mode === "rank") this.ranking.pop();
    else if (this.half !== null) this.half = null;
    else this.pairs.pop();
  }

  clear() {
    Object.assign(this, { ranking: [], pairs: [], half: null });
  }

  // The votes, or null where nothing is compared yet.
  votes() {
    const { keys, ranking, pairs } = this;
    const some = ranking.length > 0 && ranking.length < keys.length;
    const made = { pictures: keys };
    if (ranking.length > 1) made.ranking = [...ranking];
    if (some && this.restLoses) made.winners = [...ranking];
    if (pairs.length) made.pairs = pairs.map((pair) => [...pair]);
    return Object.keys(made).length > 1 ? made : null;
  }

  // What a picture has got so far, in a word: its place, or how often it won and lost.
  mark(key) {
    const place = this.ranking.indexOf(key) + 1;
    const [won, lost] = [0, 1].map((side) => this.pairs.filter((pair) => pair[side] === key).length);
    const compared = won || lost ? `+${won} −${lost}` : "";
    return [place ? String(place) : "", key === this.half ? "better than …" : compared].filter(Boolean).join(" · ");
  }

  sentence() {
    const said = [];
    if (this.ranking.length) said.push(`${this.ranking.length} of ${this.keys.length} ranked`);
    if (this.pairs.length) said.push(`${this.pairs.length} ${this.pairs.length === 1 ? "pair" : "pairs"}`);
    if (this.half !== null) return "Now the worse of the two.";
    if (!said.length) return this.mode === "rank" ? "Click the best picture, then the next best …" : "Click the better of two, then the worse.";
    return this.votes() ? said.join(", ") : `${said.join(", ")}: another one makes it a vote`;
  }
}

export function sameGroup(keys, votes) {
  const named = Array.isArray(votes?.pictures) ? votes.pictures : [];
  return named.length === keys.length && keys.every((key) => named.includes(key));
}

// How many columns make `count` tiles largest within width × height, and how wide a tile then is.
export function tiling(count, width, height, aspect = 1) {
  let best = { columns: 1, tile: 0 };
  for (let columns = 1; columns <= count; columns += 1) {
    const rows = Math.ceil(count / columns);
    const tile = Math.min((width - GAP * (columns - 1)) / columns, ((height - GAP * (rows - 1)) / rows) * aspect);
    if (tile > best.tile) best = { columns, tile };
  }
  return best;
}

let made = 0;

// The elements of one ballot. `changed(votes)` is called after every change; `done()` by the last button, where there is one; `room(grid)`
// answers how many pixels high the pictures may become together; `hint` is a line under the buttons.
export class Ballot {
  constructor({ changed = () => {}, done = null, doneLabel = "", room, hint = "" }) {
    Object.assign(this, { changed, opinion: new Opinion([]), choices: [], name: `g2rpo-ballot-${(made += 1)}` });
    this.build(done, doneLabel, hint);
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.aspect = 1;
    this.room = room;
    this.observer = new ResizeObserver(() => this.layOut());
    this.observer.observe(this.grid);
    this.say("Press Run: the pictures of the group appear here.");
  }

  build(done, doneLabel, hint) {
    this.status = element("span", { class: "g2rpo-status", role: "status" });
    this.prompt = element("span", { class: "g2rpo-run" });
    this.grid = element("div", { class: "g2rpo-choices", role: "group", "aria-label": "Pictures of the group" });
    this.modes = Object.entries(MODES).map(([mode, label]) => this.button(label, () => this.switchTo(mode), { role: "radio", "data-mode": mode }));
    const modes = element("span", { class: "g2rpo-modes", role: "radiogroup", "aria-label": "How to vote" }, ...this.modes);
    this.rest = element("input", { type: "checkbox", id: `${this.name}-rest` });
    this.rest.addEventListener("change", () => this.change(() => { this.opinion.restLoses = this.rest.checked; }));
    const rest = element("label", { for: this.rest.id, title: "Every picture that you rank beats every one that you do not" }, this.rest, "the rest loses");
    this.undo = this.button("Undo", () => this.change(() => this.opinion.undo()), { title: "Take the last click back (Backspace)" });
    this.clear = this.button("Clear", () => this.change(() => this.opinion.clear()));
    this.done = done ? [this.button(doneLabel, done, { class: "g2rpo-done" })] : [];
    this.tools = element("div", { class: "g2rpo-tools" }, modes, rest, this.undo, this.clear, ...this.done);
    this.hint = element("div", { class: "g2rpo-hint", title: hint }, hint);
    const head = element("div", { class: "g2rpo-head" }, this.status, this.prompt);
    this.root = element("div", { class: "g2rpo g2rpo-ballot", role: "group", "aria-label": "Votes" }, head, this.grid, this.tools, this.hint);
  }

  button(label, action, attributes = {}) {
    const button = element("button", { type: "button", ...attributes }, label);
    button.addEventListener("click", action);
    return button;
  }

  // Shows pictures [{key, src}] and the votes on them, if they are votes on these.
  show({ pictures, prompt = "" }, votes = null) {
    this.opinion = new Opinion(pictures.map((picture) => picture.key), votes);
    this.choices = pictures.map(({ key, src }, i) => {
      const image = element("img", { src, alt: "", draggable: "false", decoding: "async" });
      const digit = i < 10 ? String((i + 1) % 10) : "";
      const choice = element("button", { type: "button", class: "g2rpo-choice", "data-key": key }, image, element("span", { class: "g2rpo-digit" }, digit), element("span", { class: "g2rpo-place" }));
      choice.addEventListener("click", () => this.pick(i));
      return choice;
    });
    this.choices[0]?.firstElementChild.addEventListener("load", (event) => this.shape(event.target));
    this.grid.replaceChildren(...this.choices);
    this.layOut();
    write(this.prompt, prompt);
    this.prompt.title = prompt;
    this.rove(0);
    this.render();
  }

  shape({ naturalWidth, naturalHeight }) {
    this.aspect = naturalWidth / naturalHeight || 1;
    this.root.style.setProperty("--g2rpo-aspect", String(this.aspect));
    this.layOut();
  }

  layOut() {
    const { columns, tile } = tiling(this.choices.length, this.grid.clientWidth, this.room(this.grid), this.aspect);
    this.grid.style.gridTemplateColumns = tile < MIN_TILE ? "" : `repeat(${columns}, ${Math.floor(tile)}px)`;
  }

  dispose() {
    this.observer.disconnect();
  }

  // Says something in place of a group.
  say(words) {
    this.opinion = new Opinion([]);
    this.choices = [];
    this.grid.replaceChildren(element("p", {}, words));
    this.grid.style.gridTemplateColumns = "";
    this.render();
  }

  pick(i) {
    if (i >= this.choices.length) return;
    this.rove(i);
    this.change(() => this.opinion.pick(this.opinion.keys[i]));
  }

  switchTo(mode) {
    Object.assign(this.opinion, { mode, half: null });
    this.render();
  }

  change(action) {
    action();
    this.render();
    this.changed(this.opinion.votes());
  }

  // Digits choose a picture, arrows go to one, Enter and the space bar choose it (it is a button), Backspace takes back.
  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || !this.choices.length || event.target === this.rest) return;
    const at = this.choices.indexOf(event.target);
    const across = this.columns();
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across };
    if (/^[0-9]$/.test(event.key)) this.pick((Number(event.key) + 9) % 10);
    else if (event.key === "Backspace") this.change(() => this.opinion.undo());
    else if (event.key in moves && at >= 0) this.go(at + moves[event.key]);
    else if ((event.key === "Enter" || event.key === " ") && at >= 0) this.pick(at);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  go(i) {
    if (i < 0 || i >= this.choices.length) return;
    this.rove(i);
    this.choices[i].focus();
  }

  // One picture at a time is reached by the tabulator.
  rove(i) {
    this.choices.forEach((choice, j) => choice.setAttribute("tabindex", j === i ? "0" : "-1"));
  }

  columns() {
    const first = this.choices[0]?.offsetTop;
    const below = this.choices.findIndex((choice) => choice.offsetTop !== first);
    return below < 0 ? this.choices.length : below;
  }

  render() {
    const { opinion } = this;
    const shown = this.choices.length > 0;
    this.choices.forEach((choice, i) => {
      const key = opinion.keys[i];
      const mark = opinion.mark(key);
      write(choice.lastElementChild, mark);
      choice.toggleAttribute("data-chosen", Boolean(mark));
      choice.setAttribute("aria-pressed", String(Boolean(mark)));
      choice.setAttribute("aria-label", `Picture ${i + 1}${mark ? `, ${mark}` : ""}`);
    });
    for (const button of this.modes) button.setAttribute("aria-checked", String(button.dataset.mode === opinion.mode));
    this.rest.checked = opinion.restLoses;
    this.undo.disabled = this.clear.disabled = !opinion.ranking.length && !opinion.pairs.length && opinion.half === null;
    for (const button of this.done) button.disabled = !opinion.votes();
    this.tools.hidden = !shown;
    this.hint.hidden = !shown || !this.hint.textContent;
    write(this.status, shown ? opinion.sentence() : "");
  }
}
