// Numbers in words: the sentence, the list entries, the title of an error.

const names = new Intl.DisplayNames(["en"], { type: "region", fallback: "code" });

export function country(code) {
  try { return code ? names.of(code) : "an unnamed place"; } catch { return code; }
}

export const ANYWHERE_KM = 8000; // a radius above it holds most of the land

export function percent(p) {
  if (p === null || p === undefined) return "?";
  if (p > 0 && p < 0.01) return "<\u00a01\u00a0%";
  if (p > 0.99 && p < 1) return ">\u00a099\u00a0%";
  return `${Math.round(100 * p)}\u00a0%`;
}

export function km(value) {
  if (value === null || value === undefined) return "?";
  if (value < 1) return `${Math.max(10, Math.round(100 * value) * 10)}\u00a0m`;
  if (value < 10) return `${value.toFixed(1)}\u00a0km`;
  const digits = 10 ** Math.max(0, Math.floor(Math.log10(value)) - 1);
  return `${(Math.round(value / digits) * digits).toLocaleString("en")}\u00a0km`;
}

export function place(lat, lon, digits = 2) {
  const part = (value, plus, minus) => `${Math.abs(value).toFixed(digits)}°\u00a0${value < 0 ? minus : plus}`;
  return `${part(lat, "N", "S")}, ${part(lon, "E", "W")}`;
}

export function bytes(count) {
  return count < 1e6 ? `${Math.round(count / 1e3)} kB` : `${(count / 2 ** 20).toFixed(count < 1e7 ? 1 : 0)} MB`;
}

export function distanceKm(lat, lon, lat2, lon2) {
  const rad = Math.PI / 180;
  const h = Math.sin((lat2 - lat) * rad / 2) ** 2
    + Math.cos(lat * rad) * Math.cos(lat2 * rad) * Math.sin((lon2 - lon) * rad / 2) ** 2;
  return 2 * 6371.0088 * Math.asin(Math.min(1, Math.sqrt(h)));
}

// Map of country code to probability, the likeliest first; empty where no map of cells tells countries.
function countryShares(answer, countryOf) {
  const from = answer.posterior ?? { cell_ids: answer.cell_ids, probs: answer.cell_probs };
  const shares = new Map();
  from.cell_ids.forEach((id, i) => {
    const code = countryOf(id);
    if (code) shares.set(code, (shares.get(code) ?? 0) + (from.probs[i] ?? 0));
  });
  return new Map([...shares].sort((a, b) => b[1] - a[1]));
}

// {first, second}: what is known of the place, said as a person would.
export function sentence(answer, { countryOf, countryAt }) {
  if (answer.lat === null || answer.lon === null) return { first: "The model has no answer for this picture.", second: "" };
  const shares = countryShares(answer, countryOf);
  const [best] = shares.keys();
  // The country is that of the point which is told; the likeliest one may be another when nothing is sure.
  const there = countryAt(answer.lat, answer.lon), code = shares.has(there) ? there : shares.size ? best : there;
  const share = shares.get(code) ?? answer.cell_probs[0] ?? answer.confidence ?? 0;
  const point = place(answer.lat, answer.lon, answer.precision_km ? 1 : 2);
  const lost = (answer.radius_km ?? 0) >= ANYWHERE_KM;
  const within = lost || answer.radius_km === null || answer.radius_km === undefined ? `near ${point}` : `within ${km(answer.radius_km)} of ${point}`;
  const sure = share >= 0.9 ? "Almost surely" : share >= 0.55 ? "Probably" : share >= 0.25 ? "Perhaps" : "Hard to say; perhaps";
  const where = code ? `${sure} in ${country(code)} (${percent(share)}),` : sure;
  const other = best && best !== code ? ` The likeliest country by itself is ${country(best)} (${percent(shares.get(best))}).` : "";
  const second = (answer.precision_km
    ? `This service tells places only to squares of ${km(answer.precision_km)}.`
    : lost ? `It could be almost anywhere: ${answer.radius_50_km && answer.radius_50_km < ANYWHERE_KM ? `every second time such an answer is within ${km(answer.radius_50_km)}` : "the model has seen too little like it"}.`
      : answer.radius_50_km ? `Nine times out of ten it is that near; every second time within ${km(answer.radius_50_km)}.`
      : answer.radius_km ? "Nine times out of ten it is that near." : "This run was not calibrated, so no radius is known.") + other;
  if (answer.localisable === false) {
    return { first: `Too little is seen to place this picture. The best guess: ${where.charAt(0).toLowerCase()}${where.slice(1)} ${within}.`,
      second: "Do not rely on it." };
  }
  return { first: `${where} ${within}.`, second };
}

const TITLES = {
  offline: "You are offline", unreachable: "The service cannot be reached", unreadable: "The file could not be read",
  too_large: "The file is too large", wrong_type: "This is not a picture that hedwig reads", too_many: "Too many photographs",
  no_key: "This service asks for a key", bad_key: "The key is not known", expired_key: "The key has expired",
  missing_scope: "The key does not allow this", body_too_large: "The file is too large", too_many_pixels: "The picture has too many pixels",
  not_an_image: "This is not a picture", unsupported_type: "This is not a picture", bad_image: "The picture is damaged",
  empty_body: "The file is empty", body_timeout: "Sending took too long", body_incomplete: "The file did not arrive whole",
  rate_limited: "You asked too often", overloaded: "The service is busy", too_slow: "The service is busy",
  not_ready: "The service is still starting", bad_parameter: "An option is wrong", bad_body: "An option is wrong",
  bad_host: "The service does not know this address", internal: "The service failed", withheld: "This service does not tell that",
};
export const errorTitle = (code) => TITLES[code] ?? "That did not work";
