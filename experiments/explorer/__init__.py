"""The backward pass as a page that one can touch: one HTML file, filled with runs of jaxbp.

`perceptron`, `networks`, `carriers` and `own` make the runs for the four parts of the page, as
trees of numbers and arrays. `page` writes them into `template.html`, together with the style and
the scripts in this folder. The scripts draw; only the perceptron, whose points and line can be
dragged, is computed in the page, by `arithmetic.js`.
"""
