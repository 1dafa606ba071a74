// The posterior as a heat map: a soft spot for each cell, as wide as the cell, its weight the cell's probability. A
// picture in Web Mercator is laid on the map; it covers only where the probability is, so it stays sharp close by.

import { colour } from "./dom.js";

const L = window.L;
const SIDE_PX = 512;
const HELD = 0.995;
const KM_PER_DEG = 111.195;

const northing = (lat) => Math.log(Math.tan(Math.PI / 4 + Math.max(-85, Math.min(85, lat)) * Math.PI / 360)) * 180 / Math.PI;
const latitude = (y) => (2 * Math.atan(Math.exp(y * Math.PI / 180)) - Math.PI / 2) * 180 / Math.PI;

export function heatOverlay(answer, cells, pane) {
  const spots = spotsOf(answer, cells);
  if (!spots.length) return null;
  let west = 180, east = -180, south = 1e9, north = -1e9;
  for (const { x, y, r } of spots) {
    west = Math.min(west, x - 3 * r); east = Math.max(east, x + 3 * r);
    south = Math.min(south, y - 3 * r); north = Math.max(north, y + 3 * r);
  }
  const side = Math.max(east - west, north - south), scale = SIDE_PX / side;
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.ceil((east - west) * scale));
  canvas.height = Math.max(1, Math.ceil((north - south) * scale));
  const mass = new Float32Array(canvas.width * canvas.height);
  for (const { x, y, r, p } of spots) add(mass, canvas, (x - west) * scale, (north - y) * scale, Math.max(8, r * scale), p);
  paint(canvas, mass);
  return L.imageOverlay(canvas.toDataURL("image/png"), [[latitude(south), west], [latitude(north), east]], { pane, interactive: false, alt: "" });
}

function spotsOf(answer, cells) {
  const listed = answer.posterior ?? { cell_ids: answer.cell_ids, probs: answer.cell_probs };
  const total = listed.probs.reduce((sum, p) => sum + (p ?? 0), 0);
  const spots = [];
  let held = 0;
  for (let i = 0; i < listed.cell_ids.length && held < HELD * total; i++) {
    const cell = cells.get(listed.cell_ids[i]), p = listed.probs[i] ?? 0;
    held += p;
    const lat = cell?.lat ?? answer.cell_lat?.[i], lon = cell?.lon ?? answer.cell_lon?.[i];
    if (typeof lat !== "number" || typeof lon !== "number" || p <= 0) continue;
    const r = 0.6 * Math.max(5, cell?.radius_km ?? 30) / KM_PER_DEG / Math.max(0.1, Math.cos(lat * Math.PI / 180));
    spots.push({ x: lon, y: northing(lat), r, p });
  }
  return spots;
}

// A soft spot around (x, y). A wide cell glows less than a narrow one of the same probability, but not as little as a
// density would: large cells would then not be seen at all.
function add(mass, { width, height }, x, y, sigma, p) {
  const peak = p / sigma, reach = 3 * sigma;
  for (let row = Math.max(0, Math.floor(y - reach)); row < Math.min(height, y + reach); row++) {
    for (let column = Math.max(0, Math.floor(x - reach)); column < Math.min(width, x + reach); column++) {
      mass[row * width + column] += peak * Math.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * sigma * sigma));
    }
  }
}

function paint(canvas, mass) {
  const context = canvas.getContext("2d"), picture = context.createImageData(canvas.width, canvas.height);
  context.fillStyle = colour("amber");
  context.fillRect(0, 0, 1, 1);
  const [red, green, blue] = context.getImageData(0, 0, 1, 1).data;
  const most = mass.reduce((a, b) => Math.max(a, b), 1e-12);
  for (let i = 0; i < mass.length; i++) {
    const depth = Math.sqrt(mass[i] / most), heat = Math.max(0, depth - 0.5) * 2;
    picture.data.set([red + (190 - red) * heat, green * (1 - 0.75 * heat), blue * (1 - heat), 190 * Math.min(1, depth * 1.3)], 4 * i);
  }
  context.putImageData(picture, 0, 0);
}
