// What the page knows of one run: rows fetched bit by bit, samples, and the newest progress event. No page in here, so that Node can test it.

import { alarmAfter, collect, emptySeries } from "./curve.mjs";

export const RUN_ID = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;

export class Feed {
  // `get(path)` answers {status, data}; `changed()` is called after every change.
  constructor(id, get, changed = () => {}) {
    Object.assign(this, { id, get, changed });
    this.clear();
    this.progress = null;
    this.problem = "";
    this.loaded = false;
    this.fetching = null;
    this.again = false;
  }

  clear() {
    this.series = emptySeries();
    this.alarm = null;
    this.next = 0;
    this.step = null;
    this.totalSteps = null;
    this.finished = false;
    this.created = null;
    this.samples = [];
  }

  // Takes an event. Rows are fetched only when there are new ones.
  take(progress) {
    const ended = progress.phase === "done" || progress.phase === "stopped";
    this.progress = progress;
    this.changed();
    if (ended || !this.loaded || this.problem || progress.row !== this.next) this.refresh();
  }

  // The prompt ended without a last word of the node: an error or an interruption.
  stop() {
    if (!this.progress || ["done", "stopped"].includes(this.progress.phase)) return;
    this.take({ ...this.progress, phase: "stopped" });
  }

  // Fetches what is new; calls that come meanwhile lead to one more round.
  refresh() {
    if (this.fetching) {
      this.again = true;
      return this.fetching;
    }
    this.fetching = this.fetchAll().finally(() => {
      this.fetching = null;
      this.changed();
    });
    return this.fetching;
  }

  async fetchAll() {
    do {
      this.again = false;
      let more = true;
      while (more) more = await this.fetchSome();
    } while (this.again);
    this.loaded = true;
  }

  async fetchSome() {
    const { status, data } = await this.get(`/g2rpo/runs/${encodeURIComponent(this.id)}/metrics?after=${this.next}`);
    if (status !== 200 || !Array.isArray(data?.rows)) {
      this.problem = problemOf(status, data);
      return false;
    }
    this.problem = "";
    if (data.reset || (this.created !== null && this.created !== data.created)) {
      this.clear();
      this.created = data.created;
      return true;
    }
    collect(this.series, data.rows);
    this.alarm = alarmAfter(this.alarm, data.rows);
    this.step = data.rows.findLast((row) => Number.isFinite(row?.step))?.step ?? this.step;
    const forward = data.next > this.next;
    this.next = data.next;
    this.created = data.created;
    this.totalSteps = data.total_steps ?? null;
    this.finished = Boolean(data.finished);
    this.samples = Array.isArray(data.samples) ? data.samples : [];
    return forward && data.next < data.total;
  }
}

export function problemOf(status, data) {
  if (status === 404 && data?.error) return "No run of this name yet.";
  if (status === 404) return "This server does not answer questions about runs.";
  if (status === 0) return "The server does not answer.";
  return data?.error ?? `The server answered ${status}.`;
}
