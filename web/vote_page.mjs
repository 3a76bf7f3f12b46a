// The page that `g2rpo vote` writes: every group that waits for votes, and a file of the votes to save. It is one file that works offline;
// the command puts the sources of dom.mjs and ballot.mjs before this one, in the same script.

import { Ballot, KEYS } from "./ballot.mjs";
import { element, write } from "./dom.mjs";

const { schema, run, groups } = JSON.parse(document.getElementById("groups").textContent);
const found = groups.map(() => null);
let saved = true;

const voter = element("input", { type: "text", id: "voter", maxlength: "64", "aria-label": "Your name", placeholder: "your name, if several vote" });
const save = element("button", { type: "button", class: "g2rpo-done", id: "save" }, "Save votes.json");
const state = element("span", { role: "status", id: "state" });

// A group is to be seen whole, between its title and the foot of the page.
const room = () => Math.max(window.innerHeight - 210, 200);

const cards = groups.map((group, i) => {
  const ballot = new Ballot({ changed: (votes) => keep(i, votes), room });
  ballot.show(group);
  window.addEventListener("resize", () => ballot.layOut());
  const title = element("h2", {}, `${i + 1} of ${groups.length}: ${group.prompt}`);
  return element("section", {}, title, ballot.root);
});

function keep(i, votes) {
  found[i] = votes && { ...votes, prompt: groups[i].prompt };
  saved = false;
  tell();
}

function tell() {
  const count = found.filter(Boolean).length;
  write(state, `${count} of ${groups.length} groups voted on${saved ? "" : ", not saved yet"}`);
  save.disabled = count === 0;
}

function votes() {
  const name = voter.value.trim();
  return found.filter(Boolean).map((table) => (name ? { ...table, voter: name } : table));
}

save.addEventListener("click", () => {
  const file = new Blob([JSON.stringify({ schema, votes: votes() }, null, 1)], { type: "application/json" });
  const link = element("a", { href: URL.createObjectURL(file), download: "votes.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  saved = true;
  tell();
});

window.addEventListener("beforeunload", (event) => {
  if (!saved) event.preventDefault();
});

const words = [
  "Click the best picture first, then the next best, as far as you like; or switch to pairs. ",
  KEYS,
];
document.body.append(
  element("header", {}, element("h1", {}, "Which pictures are best?"), element("p", {}, `Run ${run}. `, ...words)),
  ...cards,
  element("footer", {}, state, voter, save),
);
tell();
