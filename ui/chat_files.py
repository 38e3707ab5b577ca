"""The part of the Chat tab's script that brings files: chosen, pasted or dropped, and pictures in messages.

A picture is asked for once and kept by the browser: what is drawn anew does not bring it again.
"""

SCRIPT = r"""
  // files of the user; the text of a picture is a data: URL
  const isPicture = (text) => /^data:image[/](png|jpeg|webp|gif);base64,/.test(text);
  gw.attachedTexts = () => JSON.stringify(gw.files.filter(([, text]) => !isPicture(text)));
  const drawn = (url) => { const image = new Image(); image.alt = ''; image.src = url; return image; };
  const picture = async (file, done) => {
    if (!find('#gw-head [data-sees]')) {
      gw.say(file.name + ' is a picture. The loaded model reads text alone: describe it in words, or load one that sees.');
      return;
    }
    if (!/[/](png|jpeg|webp|gif)$/.test(file.type)) {
      gw.say(file.name + ' is no PNG, JPEG, WebP or GIF. Save it as one of these.'); return;
    }
    if (file.size > 40000000) { gw.say(file.name + ' is larger than 40 MB. Make it smaller.'); return; }
    try {
      let url = await new Promise((done, failed) => {
        const reader = new FileReader();
        reader.onload = () => done(reader.result); reader.onerror = failed; reader.readAsDataURL(file);
      });
      const image = drawn(url); await image.decode();
      const share = Math.min(1, 1536 / Math.max(image.naturalWidth, image.naturalHeight));
      if (share < 1 || url.length > 1500000) { // models look at it smaller than that, too
        const canvas = document.createElement('canvas');
        canvas.width = Math.max(1, Math.round(image.naturalWidth * share));
        canvas.height = Math.max(1, Math.round(image.naturalHeight * share));
        const pen = canvas.getContext('2d');
        pen.fillStyle = 'white'; pen.fillRect(0, 0, canvas.width, canvas.height); // behind what is transparent
        pen.drawImage(image, 0, 0, canvas.width, canvas.height);
        url = canvas.toDataURL('image/jpeg', 0.85);
      }
      done(file.name || 'picture', url);
    } catch (error) { gw.say(file.name + ' is damaged: the browser cannot show it.'); }
  };
  // pictures of messages: asked for once, then drawn again whenever their message is
  const known = new Map();
  const again = (name) => setTimeout(() => { if (!known.get(name)) known.delete(name); }, 8000); // if no answer came
  gw.pictures = () => {
    const asked = [];
    for (const each of document.querySelectorAll('#gw-past .gw-picture:not(:has(img))')) {
      const name = each.value.slice('picture '.length);
      if (!known.has(name)) { known.set(name, ''); asked.push(name); again(name); }
      else if (known.get(name)) each.replaceChildren(drawn(known.get(name)));
    }
    while (asked.length) gw.act('pictures', ...asked.splice(0, 4));
  };
  gw.seen = (found) => {
    for (const [name, url] of Object.entries(found)) if (isPicture(url)) known.set(name, url);
    gw.pictures();
  };
  gw.enlarge = (button) => {
    const image = find('img', button);
    if (!image) return;
    const large = document.createElement('dialog');
    large.id = 'gw-large'; large.setAttribute('aria-label', button.title);
    const close = document.createElement('button');
    close.type = 'button'; close.textContent = 'Close'; close.onclick = () => large.close();
    large.append(drawn(image.src), close);
    large.onclick = (event) => { if (event.target === large) large.close(); };
    large.onclose = () => { large.remove(); button.focus(); };
    root().append(large); large.showModal();
  };

  const bring = async (files, kind, done) => {
    for (const file of files) {
      if (kind === 'text' && /^(audio|video)[/]/.test(file.type)) {
        gw.say(file.name + ' is a recording. The models that run here read text and pictures: describe it in words.');
      } else if (kind === 'text' && file.type.startsWith('image')) await picture(file, done);
      else if (file.size > 20000000) gw.say(file.name + ' is larger than 20 MB.');
      else done(file.name, await file.text());
    }
  };
  const pick = (kind, done) => {
    const input = document.createElement('input');
    input.type = 'file'; input.multiple = true; input.className = 'gw-file'; input.style.display = 'none';
    input.onchange = async () => { await bring(input.files, kind, done); input.remove(); };
    document.body.append(input); input.click();
  };
  const holdsFiles = (data) => data && [...data.types].includes('Files');
  document.addEventListener('paste', (event) => {
    if (event.target !== box() || !holdsFiles(event.clipboardData)) return;
    if ([...event.clipboardData.types].includes('text/plain')) return; // words with a picture of them
    event.preventDefault(); bring(event.clipboardData.files, 'text', gw.attach);
  });
  for (const kind of ['dragover', 'drop']) document.addEventListener(kind, (event) => {
    if (!event.target.closest?.('#gw-main') || !holdsFiles(event.dataTransfer)) return;
    event.preventDefault();
    if (kind === 'drop') bring(event.dataTransfer.files, 'text', gw.attach);
  });
  gw.attach = (name, text) => {
    if (text.includes('\u0000') || (text.match(/\uFFFD/g) || []).length > text.length / 50) {
      gw.say(name + ' is not a text file.'); return;
    }
    gw.files.push([name, text]); gw.chips(); gw.measure(); gw.drafted();
  };
  gw.chips = () => {
    const at = find('#gw-files'); if (!at) return;
    let row = find('.gw-chips', at);
    if (!row) { row = document.createElement('div'); row.className = 'gw-chips'; at.append(row); }
    row.replaceChildren(...gw.files.map(([name, text], index) => {
      const chip = document.createElement('button');
      chip.type = 'button'; chip.className = 'gw-chip'; chip.title = 'Take ' + name + ' away';
      chip.textContent = name + (isPicture(text) ? '' : ' · ' + Math.max(1, Math.round(text.length / 1024)) + ' KB') + ' ×';
      if (isPicture(text)) chip.prepend(drawn(text));
      chip.onclick = () => { gw.files.splice(index, 1); gw.chips(); gw.measure(); gw.drafted(); };
      return chip;
    }));
  };
"""

CSS = """
.gw-chip img { height: 34px; max-width: 60px; object-fit: cover; border-radius: 6px; margin-right: 7px; vertical-align: middle; }
button.gw-picture { padding: 0 !important; border: 1px solid var(--gw-line) !important; border-radius: 10px !important;
  overflow: hidden !important; min-width: 44px; min-height: 44px; }
button.gw-picture img { display: block; max-width: min(280px, 60vw); max-height: 220px; margin: 0 !important; }
#gw-large { border: none; padding: 0; background: none; max-width: 96vw; max-height: 96vh; margin: auto; overflow: visible; }
#gw-large::backdrop { background: rgb(0 0 0 / .7); }
#gw-large img { display: block; max-width: 94vw; max-height: 84vh; border-radius: 8px; background: white; }
#gw-large button { display: block; margin: 12px auto 0; min-height: 44px; padding: 0 22px; border: none; border-radius: 8px;
  cursor: pointer; background: white; color: #0f172a; font: inherit; }
"""
