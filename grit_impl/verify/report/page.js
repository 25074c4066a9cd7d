"use strict";
document.documentElement.classList.add("js");
addEventListener("DOMContentLoaded", () => {
  const make = (tag, attributes, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };

  // Narrow screens show a row as a block: each value then says which column it is of. Wide ones sort by a column.
  const number = text => { const found = text.replace("\u2212", "-").match(/^[+-]?[\d.]+(e[+-]?\d+)?/); return found ? parseFloat(found[0]) : NaN; };
  for (const table of document.querySelectorAll("table.numbers")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    for (const row of body.rows) [...row.cells].forEach((cell, i) => { cell.dataset.label = heads[i].textContent.trim(); });
    if (body.rows.length < 3) continue;
    heads.forEach((head, column) => {
      if (!head.textContent.trim()) return;
      const button = make("button", { type: "button", class: "sort" }, ...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") !== "descending";
        heads.forEach(each => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = row => row.cells[column].firstChild ? row.cells[column].firstChild.textContent.trim() : "";
        const rows = [...body.rows].sort((one, other) => {
          const a = number(key(one)), b = number(key(other));
          if (isNaN(a) !== isNaN(b)) return isNaN(a) ? 1 : -1;
          const order = isNaN(a) ? key(one).localeCompare(key(other)) : a - b;
          return down ? -order : order;
        });
        body.append(...rows);
      });
    });
  }

  // A link to a claim opens it.
  const open = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", open);
  open();

  const store = document.getElementById("stored");
  if (!store) return;
  const { models, items } = JSON.parse(store.textContent), STEP = 25;
  const form = document.getElementById("filter"), list = document.getElementById("found");
  const count = document.getElementById("count"), more = document.getElementById("more");
  let shown = STEP;
  const right = (item, model) => { const said = item.a[models.indexOf(model)]; return said ? said[1] : null; };
  const matches = () => {
    const { suite, change, from, to, text } = Object.fromEntries(new FormData(form));
    const wanted = text.trim().toLowerCase();
    return items.filter(item => {
      if (suite && item.s !== suite) return false;
      if (wanted && !(item.q + " " + item.a.map(each => each ? each[0] : "").join(" ")).toLowerCase().includes(wanted)) return false;
      const before = right(item, from), after = right(item, to);
      return { "": true, lost: before === 1 && after === 0, gained: before === 0 && after === 1,
        wrong: before === 0 && after === 0, right: before === 1 && after === 1, none: before === null || after === null }[change];
    });
  };
  const draw = () => {
    const found = matches();
    count.textContent = `${found.length} of ${items.length} questions`;
    list.replaceChildren(...found.slice(0, shown).map(item => make("li", {},
      make("p", { class: "question" }, item.q, item.t ? make("small", {}, ` truth: ${item.t}`) : ""),
      make("dl", {}, ...models.flatMap((model, i) => item.a[i] ? [make("dt", {}, model), make("dd", {},
        make("span", { class: "mark " + ["bad", "good"][item.a[i][1]] }, ["wrong", "right"][item.a[i][1]] || "no answer"), " " + item.a[i][0])] : [])))));
    more.hidden = found.length <= shown;
  };
  form.addEventListener("input", () => { shown = STEP; draw(); });
  form.addEventListener("submit", event => event.preventDefault());
  more.addEventListener("click", () => { shown += STEP; draw(); });
  draw();
});
