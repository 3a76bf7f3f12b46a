// Run by test_page.py with Node's own test runner: what clicks on a ballot come to, without a page.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Opinion, sameGroup, tiling } from "../web/ballot.mjs";

const KEYS = ["a", "b", "c", "d"];
const clicked = (mode, ...keys) => {
  const opinion = Object.assign(new Opinion(KEYS), { mode });
  keys.forEach((key) => opinion.pick(key));
  return opinion;
};

test("nothing clicked is no vote", () => assert.equal(new Opinion(KEYS).votes(), null));

test("one click says that a picture beats the rest", () => {
  assert.deepEqual(clicked("rank", "c").votes(), { pictures: KEYS, winners: ["c"] });
});

test("without the rest one click compares nothing, and two compare each other", () => {
  const opinion = Object.assign(clicked("rank", "c"), { restLoses: false });
  assert.equal(opinion.votes(), null);
  opinion.pick("a");
  assert.deepEqual(opinion.votes(), { pictures: KEYS, ranking: ["c", "a"] });
});

test("a whole ranking needs no winners", () => {
  assert.deepEqual(clicked("rank", ..."cadb").votes(), { pictures: KEYS, ranking: [..."cadb"] });
});

test("a second click takes a picture out, undo the last one", () => {
  const opinion = clicked("rank", "a", "b", "c", "b");
  assert.deepEqual(opinion.ranking, ["a", "c"]);
  opinion.undo();
  assert.deepEqual(opinion.ranking, ["a"]);
});

test("pairs are the better, then the worse; a picture does not beat itself", () => {
  const opinion = clicked("pairs", "a", "b", "c", "c", "d");
  assert.deepEqual(opinion.votes(), { pictures: KEYS, pairs: [["a", "b"]] });
  assert.equal(opinion.mark("d"), "better than …");
  assert.equal(opinion.mark("a"), "+1 −0");
  opinion.undo();
  assert.equal(opinion.half, null);
  opinion.undo();
  assert.equal(opinion.votes(), null);
});

test("a picture of no group is not picked", () => assert.equal(clicked("rank", "e", "__proto__").votes(), null));

test("votes are taken up again as they were given", () => {
  for (const opinion of [clicked("rank", "c"), clicked("rank", "c", "a"), clicked("rank", ..."cadb"), clicked("pairs", "a", "b", "a", "d")]) {
    assert.deepEqual(new Opinion(KEYS, opinion.votes()).votes(), opinion.votes());
  }
  const without = Object.assign(clicked("rank", "c", "a"), { restLoses: false });
  assert.deepEqual(new Opinion(KEYS, without.votes()).votes(), without.votes());
});

test("votes on another group are no votes on this one", () => {
  for (const votes of [null, {}, { pictures: "abcd" }, { pictures: ["a", "b", "c"] }, { pictures: ["a", "b", "c", "e"], winners: ["a"] }]) {
    assert.equal(sameGroup(KEYS, votes), false);
    assert.equal(new Opinion(KEYS, votes).votes(), null);
  }
  assert.equal(sameGroup(KEYS, { pictures: ["d", "c", "b", "a"] }), true);
});

test("tiles are as large as the place allows, whatever their shape", () => {
  assert.deepEqual(tiling(4, 206, 206), { columns: 2, tile: 100 });
  assert.deepEqual(tiling(12, 600, 300), { columns: 4, tile: 96 });
  assert.equal(tiling(3, 100, 900, 2).columns, 1);
  assert.deepEqual(tiling(0, 100, 100), { columns: 1, tile: 0 });
});

test("the sentence says what is missing", () => {
  assert.match(new Opinion(KEYS).sentence(), /best picture/);
  assert.equal(clicked("rank", "a").sentence(), "1 of 4 ranked");
  assert.match(Object.assign(clicked("rank", "a"), { restLoses: false }).sentence(), /another one makes it a vote/);
  assert.equal(clicked("pairs", "a").sentence(), "Now the worse of the two.");
  assert.equal(clicked("pairs", "a", "b").sentence(), "1 pair");
});
