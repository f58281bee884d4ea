"use strict";
// Shows api/status. Names come from the store and may be hostile: all text is set as text, never as HTML.

const INTERVAL_MS = 10000;
const SVG = "http://www.w3.org/2000/svg";
const LEAST_S = 300; // of time on a plot

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  while (number >= 1000 && unit < units.length - 1) { number /= 1000; unit += 1; }
  return `${unit && number < 100 ? number.toFixed(1) : Math.round(number)} ${units[unit]}`;
}

function count(number) {
  return number < 10 && number % 1 ? number.toFixed(1) : Math.round(number).toLocaleString("en");
}

function age(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

// How fast a counter grows, between each two samples: [time, per second], or [time, null] where one is not known.
function rates(history, at) {
  const points = [];
  for (let i = 1; i < history.length; i += 1) {
    const [before, now] = [history[i - 1], history[i]];
    const seconds = now[0] - before[0];
    const known = before.length > 1 && now.length > 1 && seconds > 0;
    // A counter that is less than before has begun anew, with another server.
    const grown = known ? (now[at] >= before[at] ? now[at] - before[at] : now[at]) : 0;
    points.push([now[0], known ? grown / seconds : null]);
  }
  return points;
}

function values(history, at) {
  return history.map((sample) => [sample[0], sample.length > 1 ? sample[at] : null]);
}

function line(points, { end, span }, most, closed) {
  let path = "";
  let first = null;
  let last = null;
  const close = () => (closed && first !== null ? `L${last} 100L${first} 100Z` : "");
  for (const [time, value] of points) {
    const x = Math.max(0, 100 * (1 - (end - time) / span)).toFixed(2);
    if (value === null) { path += close(); first = null; continue; }
    path += `${first === null ? "M" : "L"}${x} ${(97 - 94 * (value / most)).toFixed(2)}`;
    if (first === null) first = x;
    last = x;
  }
  return path + close();
}

function plot(title, series, shown, time) {
  const most = Math.max(...series.flatMap(({ points }) => points.map((point) => point[1] || 0)), 1e-9);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${title}, the last ${age(time.span)}, at most ${shown(most)}`);
  const add = (path, kind) => {
    const made = document.createElementNS(SVG, "path");
    made.setAttribute("d", path);
    made.setAttribute("class", kind);
    svg.append(made);
  };
  if (series.length === 1) add(line(series[0].points, time, most, true), "fill");
  series.forEach(({ points }, number) => add(line(points, time, most, false), number ? "two" : "one"));
  const keys = series.length > 1
    ? series.map(({ name }, number) => element("span", { class: `key ${number ? "two" : "one"}` }, name)) : [];
  return element("div", { class: "plot" },
    element("h3", {}, title, ...keys), svg,
    element("div", { class: "axis" }, element("span", {}, `${age(time.span)} ago`),
      element("span", {}, `max ${most > 1e-9 ? shown(most) : "0"}`), element("span", {}, "now")));
}

function number(label, value, note) {
  return element("div", {}, element("h3", {}, label), element("strong", {}, value),
    note ? element("span", { class: "soft" }, note) : null);
}

function share(part, whole) {
  if (!part) return [];
  const percent = whole ? Math.min(100, Math.round(100 * part / whole)) : 100;
  // By the property, as the policy of this page forbids style attributes.
  const fill = element("i");
  fill.style.width = `${percent}%`;
  return [`${percent} %`, element("span", { class: "bar" }, fill)];
}

function users(model, whole) {
  if (!model.open && !model.users.length) return [];
  if (!whole) return [`${model.open} open`];
  const shown = model.users.map((user) =>
    `${user.program} (${user.pid}${user.container ? `, container ${user.container}` : ""})`);
  if (model.others) shown.push(`${model.others} more`);
  return [shown.join(", ") || `${model.open} open`];
}

function table(mount, whole, gpu) {
  if (!mount.models.length) return element("p", { class: "soft" }, "No model is cached that you may see here.");
  const heads = ["Model", "Size", "Disk", "Memory", ...(gpu ? ["GPU"] : []), "Opens", "Open by"];
  const row = (model) => {
    const name = model.files > 1 ? `${model.model}/` : model.model;
    const cells = [[name + (model.pinned ? " (pinned)" : "")], [bytes(model.size)], share(model.disk, model.size),
      share(model.memory, model.size), ...(gpu ? [[model.gpu ? bytes(model.gpu) : ""]] : []), [count(model.uses)],
      users(model, whole)];
    return element("tr", {}, ...cells.map((cell, at) => element("td",
      { "data-label": heads[at], ...(cell.length ? {} : { class: "empty" }) }, element("span", {}, ...cell))));
  };
  return element("table", {},
    element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
    element("tbody", {}, ...mount.models.map(row)));
}

function card(mount, status) {
  const state = mount.hidden ? ["another user's", "soft"] : mount.error ? ["does not answer", "bad"]
    : mount.problems.length ? ["degraded", "bad"] : ["well", "good"];
  const made = element("section", { class: "mount" }, element("div", { class: "title" },
    element("h2", {}, mount.mountpoint), element("span", { class: `badge ${state[1]}` }, state[0]),
    element("span", { class: "soft" }, mount.store)));
  for (const problem of [...mount.problems, ...(mount.error ? [mount.error] : [])]) {
    made.append(element("p", { class: "problem" }, problem));
  }
  const at = (name) => status.plotted.indexOf(name) + 1;
  const { numbers, history } = mount;
  if (!mount.error) {
    const of = (most) => (most ? `of ${bytes(most)}` : "");
    made.append(element("div", { class: "numbers" },
      number("Disk", bytes(numbers.disk_used), of(numbers.disk_budget)),
      number("Memory", bytes(numbers.memory_used), of(numbers.memory_budget)),
      numbers.saved ? number("Saved by sharing", bytes(numbers.saved)) : null,
      number("Open files", count(numbers.open)),
      number("Fetched", bytes(numbers.fetched), `${count(numbers.in_flight)} requests under way`),
      number("Store requests", count(numbers.requests), `${count(numbers.failed_attempts)} attempts failed`),
      number("Failed fetches", count(numbers.failed_chunks), "chunks"),
      number("Server", mount.started ? age(status.time - mount.started) : "?",
        `version ${mount.version || "?"}, replaced ${count(numbers.restarts)} ${numbers.restarts === 1 ? "time" : "times"}`)));
  }
  if (history.length > 1) {
    const time = { end: status.time, span: Math.max(LEAST_S, status.time - history[0][0]) };
    made.append(element("div", { class: "plots" },
      plot("Fetch rate", [{ points: rates(history, at("fetched")) }], (most) => `${bytes(most)}/s`, time),
      plot("Store requests", [{ name: "all", points: rates(history, at("requests")) },
        { name: "failed", points: rates(history, at("errors")) }], (most) => `${count(most)}/s`, time),
      plot("Opens", [{ name: "kernel", points: rates(history, at("passthrough")) },
        { name: "server", points: rates(history, at("cached")) }], (most) => `${count(most)}/s`, time),
      plot("Open files", [{ points: values(history, at("open")) }], count, time),
      plot("Cached bytes", [{ name: "disk", points: values(history, at("disk")) },
        { name: "memory", points: values(history, at("memory")) }], bytes, time)));
  }
  for (const wait of mount.waits) {
    made.append(element("p", { class: "soft" }, `${wait.program} waits for ${wait.path}, ${age(wait.seconds)} by now`));
  }
  if (!mount.error) {
    made.append(table(mount, status.whole, mount.models.some((model) => model.gpu)));
    if (mount.more_models) made.append(element("p", { class: "soft" }, `and ${mount.more_models} more models`));
  }
  return made;
}

async function refresh() {
  const state = document.getElementById("state");
  try {
    // Of the address without a user and a password, which fetch refuses.
    const answer = await fetch(new URL("api/status", location.origin + location.pathname), { cache: "no-store" });
    if (!answer.ok) throw new Error(`${answer.status} ${(await answer.text()).trim()}`);
    const status = await answer.json();
    document.getElementById("mounts").replaceChildren(...status.mounts.map((mount) => card(mount, status)));
    const bad = status.mounts.filter((mount) => !mount.hidden && (mount.error || mount.problems.length)).length;
    state.textContent = `${status.mounts.length} mounts, ${bad ? `${bad} not well` : "all well"}, at ` +
      `${new Date(status.time * 1000).toLocaleTimeString("en-GB")}, exporter ${status.version}`;
    state.className = bad ? "bad" : "";
  } catch (error) {
    state.textContent = `the exporter does not answer: ${error.message}`;
    state.className = "bad";
  }
  setTimeout(refresh, INTERVAL_MS);
}

refresh();
