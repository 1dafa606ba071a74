// The map: country outlines, geocells shaded by probability, neighbours, the answer, its circles, and a heat map.
// Leaflet draws; there are no tiles. All marks are also in the lists, so the map itself may be skipped by ear.

import { byId, colour } from "./dom.js";
import { heatOverlay } from "./heat.js";
import { ANYWHERE_KM, country, km, percent } from "./words.js";

const L = window.L;
const FAINT = 0.002; // a cell below this share keeps its plain look
const WORLD = [[-58, -168], [76, 178]];

export class WorldMap {
  constructor() {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.map = L.map("map", {
      preferCanvas: true, attributionControl: false, zoomSnap: 0.25, minZoom: 0.5, maxZoom: 13, zoomAnimation: !still, fadeAnimation: !still,
      inertia: !still, maxBounds: [[-86, -220], [86, 220]], maxBoundsViscosity: 0.8,
    });
    this.still = still;
    // Panes decide what lies on what; a canvas for each.
    this.renderers = {};
    for (const [name, z] of [["land", 300], ["cells", 350], ["heat", 450], ["marks", 500]]) {
      this.map.createPane(name).style.zIndex = z;
      if (name !== "marks") this.map.getPane(name).style.pointerEvents = name === "cells" ? "auto" : "none";
      if (name !== "heat") this.renderers[name] = L.canvas({ pane: name, padding: 0.3 });
    }
    this.map.getPane("marks").style.pointerEvents = "none";
    L.control.scale({ imperial: false }).addTo(this.map);
    this.features = new Map();
    this.layers = new Map();
    this.heat = null;
    this.marks = { neighbours: L.layerGroup(), rings: L.layerGroup().addTo(this.map), answer: L.layerGroup().addTo(this.map), lit: L.layerGroup().addTo(this.map) };
    this.marks.neighbours.addTo(this.map);
    this.home();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.repaint());
    new ResizeObserver(() => this.map.invalidateSize()).observe(byId("map"));
  }

  home() {
    const bounds = this.cellLayer?.getBounds();
    const some = bounds?.isValid() && bounds.getEast() - bounds.getWest() < 300;
    this.map.fitBounds(some ? bounds.pad(0.05) : WORLD, { animate: false });
  }

  drawLand(collection) {
    this.outlines = collection;
    this.land = L.geoJSON(collection, { interactive: false, renderer: this.renderers.land, pane: "land",
      style: () => ({ color: colour("border"), weight: 0.8, fillColor: colour("land"), fillOpacity: 1 }) }).addTo(this.map);
  }

  drawCells(collection) {
    this.collection = collection;
    this.cellLayer?.remove();
    this.features.clear();
    this.layers.clear();
    for (const feature of collection.features) this.features.set(feature.properties.cell_id, feature.properties);
    this.cellLayer = L.geoJSON(collection, { renderer: this.renderers.cells, pane: "cells", smoothFactor: 0.7,
      style: (feature) => this.cellStyle(feature.properties.cell_id),
      onEachFeature: (feature, layer) => {
        this.layers.set(feature.properties.cell_id, layer);
        layer.bindTooltip(() => this.cellWords(feature.properties), { sticky: true });
      } });
    if (byId("show-cells").checked) this.cellLayer.addTo(this.map);
    if (this.answer) this.shade();
    else this.home();
  }

  // The code of the country at a point; at sea that of the geocell there, "" where nothing is known.
  countryAt = (lat, lon) => {
    const at = (collection) => collection?.features.find(({ geometry }) => polygonsOf(geometry)
      .some(([outer, ...holes]) => inside(outer, lat, lon) && !holes.some((hole) => inside(hole, lat, lon))))?.properties.country;
    return at(this.outlines) || at(this.collection) || "";
  };

  countryOf = (id) => this.features.get(id)?.country ?? "";

  cellWords(cell) {
    const box = document.createElement("span");
    const share = this.shares?.get(cell.cell_id);
    box.textContent = [[cell.admin1, country(cell.country)].filter(Boolean).join(", "), share ? percent(share) : null, `cell ${cell.cell_id}`].filter(Boolean).join(" · ");
    return box;
  }

  cellStyle(id) {
    const share = this.shares?.get(id) ?? 0;
    const plain = { stroke: true, color: colour("cell"), weight: 0.6, opacity: 0.55, fillColor: colour("amber"), fillOpacity: 0, fill: true, dashArray: null };
    if (share < FAINT) return plain;
    // The root: a tenth of the best must still be seen.
    const depth = Math.sqrt(share / this.most);
    const inHalf = this.answer.region_50?.includes(id), inMost = this.answer.region_90?.includes(id);
    return { ...plain, fillOpacity: this.heat ? 0 : 0.1 + 0.55 * depth, opacity: 1, color: inMost || inHalf ? colour("amber-ink") : colour("cell"),
      weight: inHalf ? 2 : inMost ? 1 : 0.6, dashArray: inMost && !inHalf ? "4 3" : null };
  }

  shade() {
    for (const [id, layer] of this.layers) layer.setStyle(this.cellStyle(id));
  }

  clear() {
    this.answer = this.shares = null;
    for (const group of Object.values(this.marks)) group.clearLayers();
    this.heat?.remove();
    this.heat = null;
    this.shade();
  }

  show(answer) {
    this.clear();
    this.answer = answer;
    const listed = answer.posterior ?? { cell_ids: answer.cell_ids, probs: answer.cell_probs };
    this.shares = new Map(listed.cell_ids.map((id, i) => [id, listed.probs[i] ?? 0]));
    this.most = Math.max(1e-9, ...this.shares.values());
    this.shade();
    this.mark();
    this.heatShown(byId("show-heat").checked);
    this.fit();
  }

  mark() {
    const { answer, marks, renderers } = this, pane = "marks", renderer = renderers.marks;
    const put = (shape, group) => shape.addTo(group);
    for (const area of answer.areas ?? []) {
      const half = answer.precision_km / 2 / 111.195, wide = half / Math.max(0.05, Math.cos(area.lat * Math.PI / 180));
      put(L.rectangle([[area.lat - half, area.lon - wide], [area.lat + half, area.lon + wide]],
        { renderer, pane, color: colour("amber-ink"), weight: 1, fillColor: colour("amber"), fillOpacity: 0.1 + 0.6 * area.prob }), marks.rings);
    }
    for (const [radius, dash, weight] of [[answer.radius_km, "6 5", 1.8], [answer.radius_50_km, null, 1.8]]) {
      if (radius && radius < ANYWHERE_KM && answer.lat !== null) {
        put(L.polyline(circle(answer.lat, answer.lon, radius), { renderer, pane, color: colour("ink"), weight, dashArray: dash }), marks.rings);
      }
    }
    (answer.neighbour_lat ?? []).forEach((lat, i) => {
      const lon = answer.neighbour_lon[i];
      if (lat === null || lon === null) return;
      put(L.circleMarker([lat, lon], { renderer, pane, radius: 5, color: colour("card"), weight: 1.5, fillColor: colour("blue"), fillOpacity: 1 }), marks.neighbours);
    });
    if (answer.lat === null || answer.lon === null) return;
    // The answer is an owl's eye.
    const at = [answer.lat, answer.lon];
    put(L.circleMarker(at, { renderer, pane, radius: 10, color: colour("ink"), weight: 2, fillColor: colour("amber"), fillOpacity: 1 }), marks.answer);
    put(L.circleMarker(at, { renderer, pane, radius: 4, stroke: false, fillColor: colour("ink"), fillOpacity: 1 }), marks.answer);
  }

  fit() {
    const { answer } = this;
    if (answer.lat === null) return;
    const bounds = L.latLng(answer.lat, answer.lon).toBounds(2000 * Math.min(4000, Math.max(2, answer.radius_km ?? 50)));
    const near = answer.region_50?.length ? answer.region_50 : answer.cell_ids.slice(0, 1);
    for (const id of near.slice(0, 12)) {
      const layer = this.layers.get(id);
      if (layer) bounds.extend(layer.getBounds());
    }
    for (const area of answer.areas ?? []) bounds.extend([area.lat, area.lon]);
    this.map.fitBounds(bounds, { padding: [14, 14], maxZoom: 11, animate: false });
  }

  // One cell or point of the lists; null puts the light out. `follow` moves the map to it.
  light(what, follow = false) {
    this.marks.lit.clearLayers();
    if (!what) return;
    const style = { renderer: this.renderers.marks, pane: "marks", color: colour("ink"), weight: 3.5, fill: false };
    const layer = what.cell === undefined ? null : this.layers.get(what.cell);
    if (layer) L.geoJSON(layer.toGeoJSON(), { ...style, interactive: false, style: () => style }).addTo(this.marks.lit);
    else if (typeof what.lat === "number" && typeof what.lon === "number") L.circleMarker([what.lat, what.lon], { ...style, radius: 13 }).addTo(this.marks.lit);
    else return;
    const bounds = layer ? layer.getBounds() : L.latLngBounds([[what.lat, what.lon]]);
    if (follow) this.map.fitBounds(bounds.pad(0.8), { maxZoom: Math.max(8, this.map.getZoom()), animate: !this.still });
    else if (!this.map.getBounds().contains(bounds.getCenter())) this.map.panTo(bounds.getCenter(), { animate: !this.still });
  }

  layerShown(name, shown) {
    const layer = name === "cells" ? this.cellLayer : this.marks[name];
    if (layer) layer[shown ? "addTo" : "removeFrom"](this.map);
  }

  heatShown(shown) {
    this.heat?.remove();
    this.heat = shown && this.answer ? heatOverlay(this.answer, this.features, "heat") : null;
    this.heat?.addTo(this.map);
    this.shade(); // one shading at a time
  }

  repaint() {
    this.land?.setStyle({ color: colour("border"), fillColor: colour("land") });
    if (!this.answer) { this.shade(); return; }
    for (const group of Object.values(this.marks)) group.clearLayers();
    this.shade();
    this.mark();
    this.heatShown(byId("show-heat").checked);
  }
}

const polygonsOf = (geometry) => (geometry.type === "Polygon" ? [geometry.coordinates] : geometry.coordinates);

// Whether a ray from the point crosses the ring an odd number of times.
function inside(ring, lat, lon) {
  let odd = false;
  for (let i = 0, j = ring.length - 1; i < ring.length; j = i++) {
    const [x, y] = ring[i], [x2, y2] = ring[j];
    if ((y > lat) !== (y2 > lat) && lon < (x2 - x) * (lat - y) / (y2 - y) + x) odd = !odd;
  }
  return odd;
}

// All points at this distance, by the sphere: a circle of thousands of kilometres is none on the map. Longitudes go on
// past ±180 where it crosses, so that no line runs back across the map.
function circle(lat, lon, radius) {
  const rad = Math.PI / 180, d = radius / 6371.0088, points = [];
  for (let bearing = 0; bearing <= 360; bearing += 2) {
    const b = bearing * rad;
    const to = Math.asin(Math.sin(lat * rad) * Math.cos(d) + Math.cos(lat * rad) * Math.sin(d) * Math.cos(b));
    let east = lon + Math.atan2(Math.sin(b) * Math.sin(d) * Math.cos(lat * rad), Math.cos(d) - Math.sin(lat * rad) * Math.sin(to)) / rad;
    const before = points.length ? points[points.length - 1][1] : lon;
    east += 360 * Math.round((before - east) / 360);
    points.push([to / rad, east]);
  }
  return points;
}

export const cellTitle = (cell, id) => (cell ? [cell.admin1, country(cell.country)].filter(Boolean).join(", ") : `Cell ${id}`);
export const cellDetail = (cell, id) => (cell ? `cell ${id} · ${cell.num_panoramas} reference panoramas${cell.radius_km >= 0.1 ? ` · radius ${km(cell.radius_km)}` : ""}` : "");
