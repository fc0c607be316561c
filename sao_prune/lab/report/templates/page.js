// Tables can be sorted by a click on a column's name: up, down, and as they were. Rows stay below the amount that they share.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const bodies = [...table.tBodies].map((body) => [body, [...body.rows].filter((row) => row.className !== "amount")]);
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace("\u2212", "-").replaceAll(",", ""));
    return column === 0 ? text : Number.isNaN(number) ? null : number;
  };
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const turn = { ascending: "descending", descending: "none" }[head.ariaSort] ?? "ascending";
      heads.forEach((other) => (other.ariaSort = null));
      head.ariaSort = turn === "none" ? null : turn;
      const sign = turn === "descending" ? -1 : 1;
      for (const [body, rows] of bodies) {
        const order = [...rows];
        if (turn !== "none") {
          order.sort((left, right) => {
            const [a, b] = [value(left, column), value(right, column)];
            // What has no number stands last, whichever way the others go.
            return a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b);
          });
        }
        body.append(...order);
      }
    });
  });
}
