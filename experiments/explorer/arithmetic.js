// One sigmoid unit with weights w = [w1, w2, b], for a point x = [x1, x2] with target y:
//
//   z = w1 x1 + w2 x2 + b,   y_hat = 1 / (1 + e^-z),   E = -y log y_hat - (1 - y) log(1 - y_hat)
//   dE/dw = (y_hat - y) (x1, x2, 1)
//
// This is all that the page computes itself. A test holds it to the library's numbers.

const sum = (w, x) => w[0] * x[0] + w[1] * x[1] + w[2];

const predict = (w, x) => 1 / (1 + Math.exp(-sum(w, x)));

// E = log(1 + e^z) - y z, in a form that does not overflow.
function errorOf(w, x, y) {
  const z = sum(w, x);
  return Math.max(z, 0) + Math.log1p(Math.exp(-Math.abs(z))) - y * z;
}

function gradientOf(w, x, y) {
  const slope = predict(w, x) - y;
  return [slope * x[0], slope * x[1], slope];
}

const meanError = (w, points) =>
  points.reduce((total, p) => total + errorOf(w, p.x, p.y), 0) / points.length;

function meanGradient(w, points) {
  const total = [0, 0, 0];
  for (const p of points) gradientOf(w, p.x, p.y).forEach((g, i) => { total[i] += g; });
  return total.map((g) => g / points.length);
}

const stepped = (w, gradient, rate) => w.map((value, i) => value - rate * gradient[i]);
