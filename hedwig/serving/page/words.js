// Numbers in words: the sentence, the list entries, the title of an error.

const names = new Intl.DisplayNames(["en"], { type: "region", fallback: "code" });

export function country(code) {
  try { return code ? names.of(code) : "an unnamed place"; } catch { return code; }
}

export function percent(p) {
  if (p === null || p === undefined) return "?";
  if (p > 0 && p < 0.01) return "< 1 %";
  if (p > 0.99 && p < 1) return "> 99 %";
  return `${Math.round(100 * p)} %`;
}

export function km(value) {
  if (value === null || value === undefined) return "?";
  if (value < 1) return `${Math.max(10, Math.round(100 * value) * 10)} m`;
  if (value < 10) return `${value.toFixed(1)} km`;
  const digits = 10 ** Math.max(0, Math.floor(Math.log10(value)) - 1);
  return `${(Math.round(value / digits) * digits).toLocaleString("en")} km`;
}

export function place(lat, lon, digits = 2) {
  const part = (value, plus, minus) => `${Math.abs(value).toFixed(digits)}° ${value < 0 ? minus : plus}`;
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

// [code, share] of the likeliest country; the code is "" where no map of cells tells it.
export function likeliestCountry(answer, countryOf) {
  const from = answer.posterior ?? { cell_ids: answer.cell_ids, probs: answer.cell_probs };
  const shares = new Map();
  from.cell_ids.forEach((id, i) => {
    const code = countryOf(id);
    if (code) shares.set(code, (shares.get(code) ?? 0) + (from.probs[i] ?? 0));
  });
  return [...shares].sort((a, b) => b[1] - a[1])[0] ?? ["", answer.cell_probs[0] ?? answer.confidence ?? 0];
}

// {first, second}: what is known of the place, said as a person would.
export function sentence(answer, countryOf) {
  if (answer.lat === null || answer.lon === null) return { first: "The model has no answer for this picture.", second: "" };
  const [code, share] = likeliestCountry(answer, countryOf);
  const point = place(answer.lat, answer.lon, answer.precision_km ? 1 : 2);
  const within = answer.radius_km === null || answer.radius_km === undefined ? `near ${point}` : `within ${km(answer.radius_km)} of ${point}`;
  const sure = share >= 0.9 ? "Almost surely" : share >= 0.55 ? "Probably" : share >= 0.25 ? "Perhaps" : "Hard to say; perhaps";
  const where = code ? `${sure} in ${country(code)} (${percent(share)})` : `${sure} here`;
  const second = answer.precision_km
    ? `This service tells places only to squares of ${km(answer.precision_km)}.`
    : answer.radius_50_km ? `Nine times out of ten it is that near; every second time within ${km(answer.radius_50_km)}.`
      : answer.radius_km ? "Nine times out of ten it is that near." : "This run was not calibrated, so no radius is known.";
  if (answer.localisable === false) {
    return { first: `Too little is seen to place this picture. The best guess: ${where.charAt(0).toLowerCase()}${where.slice(1)}, ${within}.`,
      second: "Do not rely on it." };
  }
  return { first: `${where}, ${within}.`, second };
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
