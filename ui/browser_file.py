"""Files that come from and go to the visitor's computer, through a hidden box: the server takes no uploads."""

import json

MOST_BYTES = 2_000_000


def open_script(accept: str) -> str:
    """JavaScript for an event whose one output is a box: the text of the file that the visitor chooses.

    `accept`: endings of file names, such as ".yaml,.yml". A file that is too long gives its size as a sentence's beginning.
    """
    return """() => new Promise((done) => {
  const pick = document.createElement('input');
  pick.type = 'file'; pick.accept = ACCEPT; pick.style.display = 'none';
  document.body.append(pick);
  const end = (text) => { pick.remove(); done(text) };
  pick.addEventListener('cancel', () => end(''));
  pick.addEventListener('change', () => {
    const file = pick.files[0];
    if (!file || file.size > MOST) return end('');
    file.text().then(end, () => end(''));
  });
  pick.click();
})""".replace("ACCEPT", json.dumps(accept)).replace("MOST", str(MOST_BYTES))


def save_script(kind: str) -> str:
    """JavaScript for an event with two inputs, a file's name and its text: the browser saves it. `kind`: a media type."""
    return """(name, text) => {
  if (!text) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: KIND}));
  link.download = name; document.body.append(link); link.click(); link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}""".replace("KIND", json.dumps(kind))


def save_picture_script() -> str:
    """JavaScript for an event with two inputs, a PNG file's name and an SVG picture: drawn twice as large, then saved."""
    return """(name, svg) => {
  if (!svg) return;
  const source = URL.createObjectURL(new Blob([svg], {type: 'image/svg+xml'}));
  const picture = new Image();
  picture.onload = () => {
    const canvas = document.createElement('canvas');
    canvas.width = 2 * picture.width; canvas.height = 2 * picture.height;
    canvas.getContext('2d').drawImage(picture, 0, 0, canvas.width, canvas.height);
    URL.revokeObjectURL(source);
    canvas.toBlob((png) => {
      const link = document.createElement('a');
      link.href = URL.createObjectURL(png);
      link.download = name; document.body.append(link); link.click(); link.remove();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }, 'image/png');
  };
  picture.src = source;
}"""
