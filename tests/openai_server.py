"""A small engine on loopback that speaks OpenAI's protocol, and can misbehave: strict, dying, slow, with a key."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_KNOWN = {
    "model", "messages", "prompt", "stream", "stream_options", "max_tokens", "temperature", "top_p", "stop", "seed",
    "presence_penalty", "frequency_penalty", "logit_bias", "tools", "tool_choice", "parallel_tool_calls",
}  # fmt: skip


class OpenAIServer:
    def __init__(
        self,
        words=("The", " capital", " of", " France", " is", " Paris", "."),
        *,
        model="tiny/model",
        key=None,
        strict=False,
        die_after=None,
        pause_s=0.0,
        finish="stop",
        context=4096,
    ):
        self.words, self.model, self.key, self.strict = words, model, key, strict
        self.die_after, self.pause_s, self.finish, self.context = die_after, pause_s, finish, context
        self.bodies, self.most_at_once, self.left = [], 0, threading.Event()  # left: a client closed its request
        self._now, self._lock = 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                if not self._allowed():
                    return
                entry = {"id": server.model, "object": "model", "created": 0, "owned_by": "x", "max_model_len": server.context}
                self._json(200, {"object": "list", "data": [entry] if server.model else []})

            def do_POST(self):
                if not self._allowed():
                    return
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.bodies.append(body)
                if server.strict and (extra := set(body) - _KNOWN):
                    self._json(400, {"error": {"message": f"Unexpected keys: {sorted(extra)}", "type": "invalid_request_error"}})
                    return
                with server._lock:
                    server._now += 1
                    server.most_at_once = max(server.most_at_once, server._now)
                try:
                    self._stream(body, "messages" in body)
                except (BrokenPipeError, ConnectionResetError):
                    server.left.set()
                finally:
                    with server._lock:
                        server._now -= 1

            def _stream(self, body, chat):
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for at, word in enumerate(server.words):
                    if at == server.die_after:
                        self.connection.close()
                        return
                    self._event(chat, word, None)
                    time.sleep(server.pause_s)
                self._event(chat, "", server.finish)
                if (body.get("stream_options") or {}).get("include_usage"):
                    usage = {"prompt_tokens": 11, "completion_tokens": len(server.words), "total_tokens": 0}
                    self._send({"id": "x", "object": "chat.completion.chunk", "choices": [], "usage": usage})
                self.wfile.write(b"data: [DONE]\n\n")

            def _event(self, chat, text, finish):
                choice = {"index": 0, "finish_reason": finish}
                choice |= {"delta": text if isinstance(text, dict) else {"content": text}} if chat else {"text": text}
                self._send({"id": "x", "object": "chunk", "created": 0, "model": server.model, "choices": [choice]})

            def _send(self, value):
                self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
                self.wfile.flush()

            def _allowed(self):
                if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                    self._json(401, {"error": {"message": f"Incorrect API key: {self.headers.get('Authorization')}"}})
                    return False
                return True

            def _json(self, status, value):
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
