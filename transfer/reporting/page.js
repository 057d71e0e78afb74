// Sorts tables and reads the confusion matrix. Names are only set as text, never as html.

// Tables: a click on a heading sorts by it, a second click turns the order round.
function valueOf(row, column) {
  const cell = row.cells[column], value = cell.dataset.value ?? cell.textContent.trim();
  return value !== "" && isFinite(value) ? Number(value) : value;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending", sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => sign * compare(valueOf(a, column), valueOf(b, column)));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      body.append(...rows);
    });
  });
}

// The matrix of many classes: the count of the cell under the pointer or finger.
const matrix = document.getElementById("matrix");

function place(id, x, y, width, height) {
  for (const [key, value] of Object.entries({ x, y, width, height })) {
    document.getElementById(id).setAttribute(key, value);
  }
}

function readMatrix() {
  const { names, images, cells, cell, margin } = JSON.parse(document.getElementById("matrix-data").textContent);
  const counts = new Map(cells.map(([row, column, count]) => [row * names.length + column, count]));
  const reading = document.getElementById("reading"), length = margin + names.length * cell;

  function read(event) {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.getScreenCTM().inverse());
    const row = Math.floor((point.y - margin) / cell), column = Math.floor((point.x - margin) / cell);
    if (row >= names.length || column < 0 || column >= names.length) return;
    place("column", margin + column * cell, 0, cell, length);
    if (row < 0) return void (reading.textContent = names[column]);
    place("row", margin, margin + row * cell, length, cell);
    place("row-name", 0, margin + row * cell, margin, cell);
    const count = counts.get(row * names.length + column) ?? 0;
    const outcome = row === column ? "correct" : `predicted as ${names[column]}`;
    reading.textContent = `${names[row]}: ${count} of ${images[row]} ${outcome}`;
  }

  matrix.addEventListener("pointermove", read);
  matrix.addEventListener("click", read);
}

if (matrix) readMatrix();
