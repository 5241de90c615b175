"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const PAGE = 24;
  const SVG = "http://www.w3.org/2000/svg";
  let shown = PAGE;
  let chosenBefore = false;

  // Every text goes in as text: an answer is never markup.
  const make = (name, text, kind) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };
  const draw = (name, attributes) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const fill = (select, options) => {
    select.replaceChildren(...options.map(([value, text]) => {
      const option = make("option", text);
      option.value = value;
      return option;
    }));
  };
  const percent = (part, whole) => (whole ? (100 * part / whole).toFixed(1) + "%" : "–");

  const benchmark = () => data.benchmarks[at("benchmark").value];
  const entry = (own, select) => own.runs.find((run) => run.run === Number(at(select).value));

  function outcome(before, after, sample) {
    if (before.marks && after.marks && before.marks[sample] !== after.marks[sample]) {
      return before.marks[sample] ? "lost" : "gained";
    }
    return before.answers[sample] === after.answers[sample] ? "same" : "other";
  }

  // Kept tokens: "n:bits" in base64, one for each view, or one for all of them.
  function keptOf(text, lengths) {
    if (!text) return null;
    const masks = text.split(" ").map((one) => {
      const [count, bits] = one.split(":");
      const bytes = atob(bits);
      return Array.from({ length: Number(count) }, (_, n) => (bytes.charCodeAt(n >> 3) >> (7 - (n & 7))) & 1);
    });
    const whole = masks.flat();
    if (whole.length !== lengths.reduce((sum, length) => sum + length, 0)) return null;
    let start = 0;
    return lengths.map((length) => whole.slice(start, (start += length)));
  }

  function overlay(svg, view, mask) {
    const columns = view.x.length - 1;
    const rows = view.y.length - 1;
    const stays = (row, column) => row >= 0 && column >= 0 && row < rows && column < columns && mask[row * columns + column];
    let pruned = "";
    let edge = "";
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const [left, right, top, bottom] = [view.x[column], view.x[column + 1], view.y[row], view.y[row + 1]];
        if (!stays(row, column)) {
          pruned += `M${left} ${top}H${right}V${bottom}H${left}Z`;
          continue;
        }
        if (!stays(row - 1, column)) edge += `M${left} ${top}H${right}`;
        if (!stays(row + 1, column)) edge += `M${left} ${bottom}H${right}`;
        if (!stays(row, column - 1)) edge += `M${left} ${top}V${bottom}`;
        if (!stays(row, column + 1)) edge += `M${right} ${top}V${bottom}`;
      }
    }
    svg.append(draw("path", { class: "pruned", d: pruned }), draw("path", { class: "rim", d: edge }),
      draw("path", { class: "edge", d: edge }));
  }

  function pictures(sample, run) {
    const tokens = sample.tokens[run];
    const numbers = sample.pictures[run] || [];
    const own = numbers.map((number) => data.pictures[number]);
    const lengths = own.flatMap((picture) => picture.views.map((view) => (view.x.length - 1) * (view.y.length - 1)));
    const masks = tokens && keptOf(data.kept[tokens[2]], lengths);
    const parts = [];
    let first = 0;
    for (const picture of own) {
      const svg = draw("svg", { class: "picture", viewBox: `0 0 ${picture.width} ${picture.height}`, role: "img" });
      const count = tokens ? `${tokens[1]} of ${tokens[0]} visual tokens kept` : "";
      svg.setAttribute("aria-label", `${picture.title}, ${count}`);
      svg.append(draw("image", { href: data.images[picture.image], width: picture.width, height: picture.height,
        preserveAspectRatio: "none" }));
      if (masks) picture.views.forEach((view, n) => overlay(svg, view, masks[first + n]));
      first += picture.views.length;
      parts.push(svg);
    }
    if (tokens) {
      let told = `${tokens[1]} of ${tokens[0]} visual tokens`;
      if (own.length && !masks && tokens[1] < tokens[0]) told += "; which of them is not drawn";
      parts.push(make("small", told));
    }
    return parts;
  }

  function side(own, sample, run, number) {
    const box = make("div");
    const mark = run.marks ? (run.marks[number] ? "right" : "wrong") : "";
    box.append(make("small", data.runs[run.run]));
    const answer = make("p", sample.texts[run.answers[number]] || "(empty)", "answer " + mark);
    if (mark) answer.prepend(mark === "right" ? "✓ " : "✗ ");
    if (mark) answer.append(make("small", ` ${mark}`));
    box.append(answer, ...pictures(sample, run.run));
    return box;
  }

  function card(own, sample, number, before, after) {
    const item = make("li");
    const about = [`sample ${sample.id}`, sample.category, `target: ${sample.target}`].filter(Boolean).join(" · ");
    const sides = make("div", undefined, "sides");
    sides.append(side(own, sample, before, number), side(own, sample, after, number));
    item.append(make("h3", sample.question), make("small", about), sides);
    return item;
  }

  function numbers(own, before, after) {
    let same = 0;
    const flips = { lost: 0, gained: 0 };
    let rights = [0, 0];
    for (let n = 0; n < own.count; n++) {
      same += before.answers[n] === after.answers[n];
      const found = outcome(before, after, n);
      if (found in flips) flips[found] += 1;
      if (before.marks && after.marks) rights = [rights[0] + before.marks[n], rights[1] + after.marks[n]];
    }
    const judged = before.marks && after.marks;
    const told = [["samples", own.count], ["same answer", percent(same, own.count)]];
    if (judged) {
      told.push(["right to wrong", flips.lost], ["wrong to right", flips.gained],
        ["right before", percent(rights[0], own.count)], ["right after", percent(rights[1], own.count)]);
    }
    at("numbers").replaceChildren(...told.map(([term, value]) => {
      const pair = make("div");
      pair.append(make("dt", term), make("dd", String(value)));
      return pair;
    }));
  }

  function list() {
    const own = benchmark();
    const [before, after] = [entry(own, "before"), entry(own, "after")];
    if (!before || !after) return;
    numbers(own, before, after);
    const words = at("search").value.toLowerCase();
    const [wanted, category] = [at("outcome").value, at("category").value];
    const found = Object.entries(own.samples).filter(([key, sample]) => {
      const n = Number(key);
      const result = outcome(before, after, n);
      if (wanted === "differ" ? result === "same" : result !== wanted) return false;
      if (category && sample.category !== category) return false;
      const texts = [sample.question, sample.target, sample.texts[before.answers[n]], sample.texts[after.answers[n]]];
      return !words || texts.join("\n").toLowerCase().includes(words);
    });
    at("samples").replaceChildren(...found.slice(0, shown).map(([key, sample]) =>
      card(own, sample, Number(key), before, after)));
    const count = Math.min(shown, found.length);
    at("count").textContent = `${count} of ${found.length} samples shown` +
      (own.hidden ? `; ${own.hidden} others of this benchmark on which runs differ are not in this file` : "");
    at("more").hidden = found.length <= shown;
  }

  function offerRuns() {
    const own = benchmark();
    const options = own.runs.map((run) => [run.run, data.runs[run.run]]);
    fill(at("before"), options);
    fill(at("after"), options);
    const pruned = own.runs.filter((run) => run.reference !== null);
    const differs = (run) => {
      const reference = own.runs.find((other) => other.run === run.reference);
      return run.answers.some((answer, n) => answer !== reference.answers[n]);
    };
    const first = pruned.find(differs) || pruned[0] || own.runs[own.runs.length - 1];
    at("after").value = first.run;
    chosenBefore = false;
    const categories = [...new Set(Object.values(own.samples).map((sample) => sample.category))].filter(Boolean).sort();
    fill(at("category"), [["", "all"], ...categories.map((name) => [name, name])]);
    takeReference();
  }

  // Against the unpruned model, until somebody chooses another run.
  function takeReference() {
    const own = benchmark();
    const after = entry(own, "after");
    if (!chosenBefore) at("before").value = after.reference ?? own.runs[0].run;
  }

  fill(at("benchmark"), data.benchmarks.map((own, n) => [n, own.label]));
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  at("controls").addEventListener("input", (event) => {
    shown = PAGE;
    if (event.target === at("overlay")) {
      at("samples").classList.toggle("plain", !at("overlay").checked);
      return;
    }
    if (event.target === at("benchmark")) offerRuns();
    if (event.target === at("before")) chosenBefore = true;
    if (event.target === at("after")) takeReference();
    list();
  });
  at("more").addEventListener("click", () => {
    const next = shown;
    shown += PAGE;
    list();
    const item = at("samples").children[next];
    if (item) {
      item.tabIndex = -1;
      item.focus();
    }
  });
  at("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  // Paper has no folds.
  addEventListener("beforeprint", () => document.querySelectorAll("details.model").forEach((part) => (part.open = true)));
  offerRuns();
  list();
})();
