
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.rows;
  const n = rows.name.length;
  const pageLength = 50;
  const byId = (id) => document.getElementById(id);
  const source = (picture) => data.format + picture;

  // All text from the data becomes text of the page, never markup.
  const element = (name, attributes = {}, ...children) => {
    const made = Object.assign(document.createElement(name), attributes);
    made.append(...children);
    return made;
  };
  const verdictOf = (i) => data.verdicts[rows.verdict[i]];
  const verdictElement = (i) => element("span", { className: "verdict " + verdictOf(i) }, verdictOf(i));
  const number = (value, digits) => (value === null ? "–" : Number(value.toPrecision(digits)).toString());

  for (const image of document.querySelectorAll("[data-picture]")) {
    const shown = data.large[image.dataset.picture];
    image.src = source(shown.map || shown.image);
  }

  // The table: an order of the images that pass the filters, of which one page is in the document.
  const collator = new Intl.Collator("en", { numeric: true });
  const heads = [...document.querySelectorAll("#table th button")];
  const filters = { name: byId("filter-name"), verdict: byId("filter-verdict"), kind: byId("filter-kind") };
  const state = { column: "score", ascending: true, page: 0, order: [] };

  const compare = (a, b) => {
    if (typeof a === "string") return collator.compare(a, b);
    // Images without a number come first, since somebody has to look at them.
    return (a ?? -Infinity) === (b ?? -Infinity) ? 0 : (a ?? -Infinity) < (b ?? -Infinity) ? -1 : 1;
  };

  const arrange = () => {
    const text = filters.name.value.toLowerCase();
    const verdict = filters.verdict.value;
    const kind = filters.kind ? filters.kind.value : "";
    const values = state.column === "verdict" ? rows.verdict.map((v) => data.verdicts[v]) : rows[state.column];
    const sign = state.ascending ? 1 : -1;
    state.order = [];
    for (let i = 0; i < n; i++) {
      if (text && !(data.folder + rows.name[i]).toLowerCase().includes(text)) continue;
      if (verdict && verdictOf(i) !== verdict) continue;
      if (kind && rows.kind[i] !== kind) continue;
      state.order.push(i);
    }
    state.order.sort((i, j) => sign * compare(values[i], values[j]));
    state.page = 0;
    draw();
  };

  const cell = (className, label, value) => {
    const made = element("td", { className }, value);
    made.dataset.label = label;
    return made;
  };

  const row = (i) => {
    const cells = [element("td", { className: "picture" })];
    if (i in data.small) {
      const button = element("button", { type: "button" });
      button.append(element("img", { src: source(data.small[i]), alt: "Picture of " + rows.name[i] }));
      button.addEventListener("click", () => open(i, state.order));
      cells[0].append(button);
    }
    const name = element("td", { className: "name" }, rows.name[i]);
    if (i in rows.reason) name.append(element("div", { className: "faint" }, rows.reason[i]));
    cells.push(name);
    if (rows.kind) cells.push(element("td", { className: "kind" }, rows.kind[i]));
    cells.push(cell("number", "score", number(rows.score[i], 5)));
    cells.push(cell("number", "p-value", number(rows.p_value[i], 3)));
    cells.push(cell("number probability", "P(anomalous)", number(rows.p_anomalous[i], 3)));
    cells.push(element("td", {}, verdictElement(i)));
    return element("tr", {}, ...cells);
  };

  const draw = () => {
    const first = state.page * pageLength;
    const shown = state.order.slice(first, first + pageLength);
    document.querySelector("#table tbody").replaceChildren(...shown.map(row));
    for (const head of heads) {
      const isSorted = head.dataset.column === state.column;
      head.parentElement.setAttribute("aria-sort", !isSorted ? "none" : state.ascending ? "ascending" : "descending");
    }
    const of = state.order.length === n ? `${n} images` : `${state.order.length} of ${n} images`;
    byId("status").textContent = shown.length ? `${first + 1} to ${first + shown.length} of ${of}` : `None of ${n} images`;
    byId("page-before").disabled = state.page === 0;
    byId("page-after").disabled = first + pageLength >= state.order.length;
  };

  for (const head of heads) {
    head.addEventListener("click", () => {
      state.ascending = head.dataset.column === state.column ? !state.ascending : true;
      state.column = head.dataset.column;
      arrange();
    });
  }
  for (const filter of Object.values(filters)) filter?.addEventListener("input", arrange);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  const turn = (step) => {
    state.page += step;
    draw();
    byId("images").scrollIntoView();
  };
  byId("page-before").addEventListener("click", () => turn(-1));
  byId("page-after").addEventListener("click", () => turn(1));

  // The columns of `dfkde score --csv`, and the kind where it is known, for the images that the table shows.
  const csv = () => {
    const quoted = (value) => (/[",\r\n]/.test(value) ? '"' + value.replaceAll('"', '""') + '"' : value);
    const lines = [["path", "score", "p_anomalous", "p_value", "verdict", "reason"]];
    if (rows.kind) lines[0].push("kind");
    for (const i of state.order) {
      const line = [data.folder + rows.name[i], rows.score[i], rows.p_anomalous[i], rows.p_value[i]];
      line.push(verdictOf(i), rows.reason[i]);
      if (rows.kind) line.push(rows.kind[i]);
      lines.push(line.map((value) => String(value ?? "")));
    }
    return lines.map((line) => line.map(quoted).join(",") + "\n").join("");
  };
  byId("export").addEventListener("click", () => {
    const address = URL.createObjectURL(new Blob([csv()], { type: "text/csv;charset=utf-8" }));
    element("a", { href: address, download: "dfkde-report.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  });

  // The viewer: one image, and the way to those before and after it where it was opened.
  const viewer = byId("viewer");
  const captions = { image: "Image", map: "Where it is called anomalous: red, within a yellow line", truth: "Where the defect is: within an orange line" };
  let series = [];
  let place = 0;

  const picture = (encoded, caption) =>
    element("figure", {}, element("img", { src: source(encoded), alt: caption }), element("figcaption", {}, caption));

  const show = () => {
    const i = series[place];
    byId("viewer-name").textContent = rows.name[i];
    const facts = byId("viewer-facts");
    facts.replaceChildren(verdictElement(i));
    if (rows.kind) facts.append(` ${rows.kind[i]}.`);
    facts.append(` Score ${number(rows.score[i], 5)}, p-value ${number(rows.p_value[i], 3)}, P(anomalous) ${number(rows.p_anomalous[i], 3)}.`);
    const large = data.large[i];
    if (large) {
      byId("viewer-pictures").replaceChildren(
        ...Object.keys(captions).filter((name) => name in large).map((name) => picture(large[name], captions[name])),
      );
    } else if (i in data.small) {
      const caption = "A small picture: only the images in the gallery have large ones.";
      byId("viewer-pictures").replaceChildren(picture(data.small[i], caption));
    } else {
      byId("viewer-pictures").replaceChildren(element("p", {}, rows.reason[i] || "No picture of this image is in the report."));
    }
    const near = data.neighbours?.[i];
    byId("viewer-neighbours").hidden = !near;
    const shown = (near || []).map(([j, distance]) => picture(data.training[j][1], `${data.training[j][0]}, distance ${distance}`));
    byId("viewer-neighbours").querySelector(".pictures").replaceChildren(...shown);
    byId("viewer-before").disabled = place === 0;
    byId("viewer-after").disabled = place === series.length - 1;
  };

  const open = (i, among) => {
    series = among;
    place = among.indexOf(i);
    show();
    viewer.showModal();
    viewer.scrollTop = 0;
  };
  const step = (by) => {
    if (!(place + by in series)) return;
    place += by;
    show();
  };
  for (const gallery of document.querySelectorAll(".cards")) {
    const cards = [...gallery.querySelectorAll(".card")];
    const indices = cards.map((card) => Number(card.dataset.index));
    for (const card of cards) card.addEventListener("click", () => open(Number(card.dataset.index), indices));
  }
  byId("viewer-before").addEventListener("click", () => step(-1));
  byId("viewer-after").addEventListener("click", () => step(1));
  byId("viewer-close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });

  arrange();
})();
