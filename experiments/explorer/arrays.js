// Arrays of the run: `array.at(i, j, ...)` is a number, or the rest of the axes as another array.

class NumberArray {
  constructor(shape, data) {
    this.shape = shape;
    this.data = data;
  }

  get length() { return this.shape[0]; }

  at(...index) {
    let size = this.data.length, start = 0;
    index.forEach((i, axis) => {
      size /= this.shape[axis];
      start += i * size;
    });
    const rest = this.shape.slice(index.length);
    if (!rest.length) return this.data[start];
    return new NumberArray(rest, this.data.subarray(start, start + size));
  }
}

function unpacked(node) {
  if (Array.isArray(node)) return node.map(unpacked);
  if (node === null || typeof node !== "object") return node;
  if (typeof node.data === "string" && node.type) {
    const bytes = Uint8Array.from(atob(node.data), (character) => character.charCodeAt(0));
    return new NumberArray(node.shape, node.type === "u8" ? bytes : new Float64Array(bytes.buffer));
  }
  return Object.fromEntries(Object.entries(node).map(([name, value]) => [name, unpacked(value)]));
}
