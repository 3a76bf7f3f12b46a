// The strip of evaluation pictures: for each prompt and seed the untrained model's picture beside the newest one.

import { number } from "./curve.mjs";
import { element } from "./dom.mjs";

const MAX_PAIRS = 24;

// `address(folder, file)` answers where a picture is.
export function samplesStrip(samples, address) {
  if (!samples.length) return [];
  const [first, last] = [samples[0], samples.at(-1)];
  const shown = first === last ? [first] : [first, last];
  const score = Object.keys(first.files[0]?.scores ?? {})[0];
  const heading = `Samples: ${shown.map((sample) => `step ${sample.step}`).join(" → ")}${score ? `, ${score}` : ""}`;
  const pairs = first.files.slice(0, MAX_PAIRS).map((file) => {
    const pictures = shown.map((sample) => [sample, sample.files.find((other) => other.file === file.file)]);
    return pair(pictures.filter(([, picture]) => picture), score, address);
  });
  return [element("div", { class: "g2rpo-heading" }, heading), element("div", { class: "g2rpo-strip", role: "list", "aria-label": heading }, ...pairs)];
}

function pair(pictures, score, address) {
  const links = pictures.map(([sample, picture]) => {
    const words = [`Step ${sample.step}`, picture.prompt, ...Object.entries(picture.scores).map(([name, value]) => `${name} ${number(value)}`)];
    const image = element("img", { src: address(sample.folder, picture.file), alt: words.join(", "), loading: "lazy", decoding: "async", draggable: "false" });
    return element("a", { href: image.src, target: "_blank", rel: "noopener", title: words.join("\n") }, image);
  });
  const caption = score ? pictures.map(([, picture]) => number(picture.scores[score])).join(" → ") : "";
  return element("figure", { role: "listitem" }, element("div", { class: "g2rpo-pair" }, ...links), element("figcaption", {}, caption));
}
