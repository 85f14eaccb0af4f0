"use strict";
{
  const get = (id) => document.getElementById(id);
  const [table, find, look, sheet, viewer] = ["table", "find", "look", "sheet", "viewer"].map(get);
  const body = table.tBodies[0];
  let rows = [...body.rows];
  document.querySelector(".tools").hidden = false;

  // ------------------------------------------------------------------------------------------------------- filtering
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const filter = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const found = words.every((word) => texts.get(row).includes(word));
      row.hidden = !found || (look.checked && !("look" in row.dataset));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    get("shown").textContent = `${shown} of ${rows.length}`;
    get("nothing").hidden = shown > 0;
  };
  find.addEventListener("input", filter);
  look.addEventListener("change", filter);

  // --------------------------------------------------------------------------------------------------------- sorting
  const compare = new Intl.Collator(undefined, { numeric: true }).compare;
  const key = (cell) =>
    cell.dataset.value === undefined ? cell.textContent.trim() : cell.dataset.value === "" ? null : +cell.dataset.value;
  const heads = [...table.tHead.rows[0].querySelectorAll("th[rowspan]"), ...table.tHead.rows[1].cells];
  const sort = (head) => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keys = new Map(rows.map((row) => [row, key(row.cells[heads.indexOf(head)])]));
    rows.sort((one, other) => {
      const [a, b] = [keys.get(one), keys.get(other)];
      if (a === null || b === null) return (a === null) - (b === null); // unknown stands last either way
      const order = typeof a === "number" ? a - b : compare(a, b);
      return down ? -order : order;
    });
    body.append(...rows);
  };
  heads.forEach((head) => head.querySelector("button")?.addEventListener("click", () => sort(head)));

  // ---------------------------------------------------------------------------------------------------------- layout
  const details = get("details");
  const narrow = () => {
    table.classList.toggle("plain", !details.checked);
    for (const group of table.tHead.querySelectorAll("[data-wide]"))
      group.colSpan = details.checked ? group.dataset.wide : group.dataset.narrow;
  };
  details?.addEventListener("change", narrow);
  if (details) narrow();
  sheet.addEventListener("change", () => table.classList.toggle("sheet", sheet.checked));
  const reveal = () => {
    const row = location.hash && get(location.hash.slice(1));
    if (!rows.includes(row)) return;
    if (row.hidden) {
      find.value = "";
      look.checked = false;
      filter();
    }
    row.scrollIntoView({ block: "center" });
  };
  addEventListener("hashchange", reveal);

  // ---------------------------------------------------------------------------------------------------------- viewer
  let current, opener;
  const linked = () => rows.filter((row) => !row.hidden && row.querySelector(".picture a"));
  const show = (row) => {
    current = row;
    const link = row.querySelector(".picture a");
    get("viewing").textContent = row.querySelector(".name").textContent;
    const about = [...row.querySelectorAll(".notes > :is(p, details)")].map((child) => child.cloneNode(true));
    about.forEach((child) => (child.open = child.localName === "details"));
    get("about").replaceChildren(...about);
    get("about").scrollTop = 0;
    get("alone").href = get("large").src = link.href;
    get("large").alt = link.querySelector("img").alt;
  };
  const step = (by) => {
    const all = linked();
    show(all[(all.indexOf(current) + by + all.length) % all.length]);
  };
  body.addEventListener("click", (event) => {
    const link = event.target.closest(".picture a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    opener = link;
    show(link.closest("tr"));
    viewer.showModal();
  });
  get("previous").addEventListener("click", () => step(-1));
  get("next").addEventListener("click", () => step(1));
  get("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  viewer.addEventListener("close", () => opener.focus());

  // ----------------------------------------------------------------------------------------------------------- paper
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...table.querySelectorAll("details:not([open])")];
    closed.forEach((each) => (each.open = true));
    document.querySelectorAll("img[loading]").forEach((each) => (each.loading = "eager"));
    if (details?.checked) {
      details.checked = false;
      narrow();
      closed.push(details);
    }
  });
  addEventListener("afterprint", () => {
    closed.forEach((each) => (each === details ? (each.checked = true) : (each.open = false)));
    if (details) narrow();
  });
}
