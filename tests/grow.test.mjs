// Which rewards Mix Rewards shows: `node --test tests/grow.test.mjs`.

import assert from "node:assert/strict";
import test from "node:test";
import { shown } from "../web/grow.mjs";

for (const [linked, most] of [[[], 2], [[1], 2], [[2], 3], [[1, 2], 3], [[1, 4], 5], [[3], 4], [[5], 6], [[6], 6], [[1, 2, 3, 4, 5, 6], 6]]) {
  test(`with ${linked.join(", ") || "nothing"} linked there are ${most}`, () => assert.equal(shown(linked), most));
}
