// The evidence in words: cells with probabilities, neighbours with scores, numbers, timings. Each entry is a button:
// reached by keyboard it lights its mark on the map, pressed it brings the map there.

import { byId, make } from "./dom.js";
import { cellDetail, cellTitle } from "./map.js";
import { distanceKm, km, percent, place } from "./words.js";

function entry(map, what, title, value, detail, share) {
  const bar = share === null ? null : make("i", { "aria-hidden": "true" });
  if (bar) bar.style.width = `${100 * Math.min(1, share)}%`;
  const button = make("button", { type: "button" }, bar, make("span", { textContent: title }), make("b", { textContent: value }),
    detail ? make("small", { textContent: detail }) : null);
  button.addEventListener("focus", () => map.light(what));
  button.addEventListener("mouseenter", () => map.light(what));
  button.addEventListener("blur", () => map.light(null));
  button.addEventListener("mouseleave", () => map.light(null));
  button.addEventListener("click", () => map.light(what, true));
  return make("li", {}, button);
}

export function drawLists(answer, map) {
  byId("evidence").hidden = false;
  const coarse = answer.areas ?? [];
  byId("cells-title").textContent = coarse.length ? "Likely areas" : "Likely cells";
  byId("cells").replaceChildren(...(coarse.length
    ? coarse.map((area) => entry(map, area, `around ${place(area.lat, area.lon, 1)}`, percent(area.prob), "", area.prob))
    : answer.cell_ids.map((id, i) => {
      const cell = map.features.get(id);
      const what = { cell: id, lat: answer.cell_lat?.[i], lon: answer.cell_lon?.[i] };
      return entry(map, what, cellTitle(cell, id), percent(answer.cell_probs[i]), cellDetail(cell, id), answer.cell_probs[i] ?? 0);
    })));
  byId("neighbours-box").hidden = answer.neighbour_ids.length === 0;
  byId("neighbours").replaceChildren(...answer.neighbour_ids.map((name, i) => {
    const lat = answer.neighbour_lat?.[i] ?? null, lon = answer.neighbour_lon?.[i] ?? null;
    const known = lat !== null && lon !== null;
    const score = answer.neighbour_scores[i];
    const detail = known ? `${place(lat, lon)}${answer.lat === null ? "" : ` · ${km(distanceKm(answer.lat, answer.lon, lat, lon))} from the answer`}` : "its place is not told";
    return entry(map, { lat, lon }, name, score === null ? "?" : score.toFixed(2), detail, null);
  }));
  drawNumbers(answer);
  const stages = Object.entries(answer.timings_ms ?? {});
  byId("stages").replaceChildren(...stages.flatMap(([name, ms]) => [make("dt", { textContent: name }), make("dd", { textContent: `${ms.toFixed(ms < 10 ? 1 : 0)} ms` })]));
  byId("made-by").textContent = [answer.model, `hedwig ${answer.version}`, answer.run_digest && `run ${answer.run_digest.slice(0, 12)}`].filter(Boolean).join(" · ");
  byId("save-words").textContent = "";
}

function drawNumbers(answer) {
  const numbers = [
    ["radius, 9 of 10", answer.radius_km === null || answer.radius_km === undefined ? null : km(answer.radius_km)],
    ["radius, 1 of 2", answer.radius_50_km === null || answer.radius_50_km === undefined ? null : km(answer.radius_50_km)],
    ["confidence", answer.confidence === null || answer.confidence === undefined ? null : percent(answer.confidence)],
    ["entropy", answer.entropy_bits === null || answer.entropy_bits === undefined ? null : `${answer.entropy_bits.toFixed(1)} bits`],
    ["cells for 50 / 90 %", answer.region_90?.length ? `${answer.region_50.length} / ${answer.region_90.length}` : null],
  ];
  byId("numbers").hidden = false;
  byId("numbers").replaceChildren(...numbers.filter(([, value]) => value !== null)
    .map(([name, value]) => make("div", {}, make("b", { textContent: value }), make("span", { class: "quiet", textContent: name }))));
}
