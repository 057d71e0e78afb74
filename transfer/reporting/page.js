// Shows the count of the confusion matrix cell under the pointer or finger. Names are only set as text, never as html.
const matrix = document.getElementById("matrix");
const { names, images, cells, cell, margin } = JSON.parse(document.getElementById("matrix-data").textContent);
const counts = new Map(cells.map(([row, column, count]) => [row * names.length + column, count]));
const reading = document.getElementById("reading");

function place(id, x, y, width, height) {
  for (const [key, value] of Object.entries({ x, y, width, height })) {
    document.getElementById(id).setAttribute(key, value);
  }
}

function read(event) {
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.getScreenCTM().inverse());
  const row = Math.floor((point.y - margin) / cell), column = Math.floor((point.x - margin) / cell);
  if (row >= names.length || column >= names.length || (row < 0 && column < 0)) return;
  const length = names.length * cell;
  if (row >= 0) place("row", 0, margin + row * cell, margin + length, cell);
  if (column >= 0) place("column", margin + column * cell, 0, cell, margin + length);
  if (row < 0 || column < 0) return void (reading.textContent = names[Math.max(row, column)]);
  const count = counts.get(row * names.length + column) ?? 0;
  const outcome = row === column ? "correct" : `predicted as ${names[column]}`;
  reading.textContent = `${names[row]}: ${count} of ${images[row]} ${outcome}`;
}

matrix.addEventListener("pointermove", read);
matrix.addEventListener("click", read);
