#!/usr/bin/env bash
# make weights against a server of this test: whole, cut and gone on with, corrupted, absent, nobody
# there, nowhere to write.
. tests/integration/common
command -v curl >/dev/null || { echo "curl is not installed"; exit 77; }

export WEIGHTS_TABLE=$TMPDIR/table.txt WEIGHTS_FOLDER=$TMPDIR/models
log=$TMPDIR/log.txt mode=$TMPDIR/mode here=$TMPDIR/hub
unset http_proxy HTTP_PROXY all_proxy ALL_PROXY
weights=scripts/weights
small=$WEIGHTS_FOLDER/tiny/config.json large=$WEIGHTS_FOLDER/tiny/model.safetensors
: >"$log"
: >"$mode"

# Two files of a repository; the larger is reached by a redirect, as on the hub.
mkdir -p "$here"
printf '{"small": true}\n' >"$here/config.json"
"$PYTHON" -c 'import random, sys; sys.stdout.buffer.write(random.Random(1).randbytes(300000))' \
    >"$here/model.safetensors"
{
    echo '# repository revision file bytes sum'
    for name in config.json model.safetensors; do
        echo "someone/tiny abc123 $name $(stat -c %s "$here/$name")" \
            "$(sha256sum <"$here/$name" | cut -d ' ' -f 1)"
    done
} >"$WEIGHTS_TABLE"

# Behaves as the mode file says: "cut N" closes the larger file's connection after N bytes, and after
# none of the next ("cut N always": after N again), "corrupt" changes a byte, "norange" ignores Range,
# "404". Logs name, Range and bytes sent of every answer.
cat >"$TMPDIR/server.py" <<'PYTHON'
import http.server, pathlib, sys

hub, mode_file, log = (pathlib.Path(p) for p in sys.argv[1:])

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        mode = mode_file.read_text().split() or [""]
        if self.path == "/someone/tiny/resolve/abc123/model.safetensors":
            self.send_response(302)
            self.send_header("Location", "/store/model.safetensors")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        known = {"/someone/tiny/resolve/abc123/config.json": "config.json",
                 "/store/model.safetensors": "model.safetensors"}
        if self.path not in known or mode[0] == "404":
            return self.send_error(404)
        name = known[self.path]
        data = bytearray((hub / name).read_bytes())
        if mode[0] == "corrupt":
            data[-1] ^= 1
        wanted = self.headers.get("Range", "")
        first = int(wanted[len("bytes="):].split("-")[0]) if wanted and mode[0] != "norange" else 0
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        end = first + int(mode[1]) if mode[0] == "cut" and name == "model.safetensors" else len(data)
        sent = self.wfile.write(data[first:end])
        with log.open("a") as file:
            print(name, wanted or "-", sent, file=file)
        if mode[0] == "cut" and mode[-1] != "always" and name == "model.safetensors":
            mode_file.write_text("cut 0")

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
PYTHON
"$PYTHON" "$TMPDIR/server.py" "$here" "$mode" "$log" >"$TMPDIR/port" &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
for _ in $(seq 100); do [ -s "$TMPDIR/port" ] && break || sleep 0.05; done
port=$(cat "$TMPDIR/port")
export HF_ENDPOINT=http://127.0.0.1:$port/

whole() {
    cmp -s "$here/config.json" "$small" && cmp -s "$here/model.safetensors" "$large" ||
        fail "$1: the files are not those of the server"
    [ -z "$(find "$WEIGHTS_FOLDER" -name '*.part')" ] || fail "$1: a .part is left"
}
logged() { [ "$(cat "$log")" = "$1" ] || { cat "$log"; fail "requests are not: $1"; }; }
again() { rm -rf "$WEIGHTS_FOLDER" && : >"$log" && echo "$1" >"$mode"; }

expect 0 'tiny/model.safetensors: fetching 293KiB' make --no-print-directory weights
whole "first run"
logged "config.json - 16
model.safetensors - 300000"

: >"$log"
expect 0 'tiny/model.safetensors: there and right' "$weights"
logged ""

# cut at byte 100000, and the server then sends nothing more: the next run asks for the rest only
again "cut 100000"
expect 6 "again, which goes on from byte 100000 of 300000" "$weights"
[ "$(stat -c %s "$large.part")" = 100000 ] && [ ! -e "$large" ] || fail "what a cut transfer left"
: >"$log"
: >"$mode"
expect 0 'model.safetensors: fetching' "$weights"
whole "resumed"
logged "model.safetensors bytes=100000- 200000"

# a connection that breaks now and then needs no second run
again "cut 100000 always"
expect 0 'model.safetensors: fetching' "$weights"
whole "cut twice"
logged "config.json - 16
model.safetensors - 100000
model.safetensors bytes=100000- 100000
model.safetensors bytes=200000- 100000"

# a server without ranges sends all again
again norange
mkdir -p "${large%/*}"
head -c 100000 "$here/model.safetensors" >"$large.part"
expect 0 'model.safetensors: fetching' "$weights"
whole "no ranges"

again corrupt
expect 3 'tiny/config.json: what came from .* is corrupted .* was removed' "$weights"
[ -z "$(find "$WEIGHTS_FOLDER" -type f)" ] || fail "a corrupted file is left"

again ""
mkdir -p "${large%/*}"
head -c 300000 /dev/zero >"$large.part"
expect 3 'model.safetensors: what came from .* is corrupted' "$weights"
[ ! -e "$large.part" ] && [ ! -e "$large" ] || fail "a corrupted rest is left"

# a file of another origin is neither taken nor overwritten
again ""
mkdir -p "${large%/*}"
echo mine >"$small"
expect 3 'tiny/config.json: not the published file' "$weights"
[ "$(cat "$small")" = mine ] || fail "a file was overwritten"

again 404
expect 6 'config.json: the server answers 404' "$weights"
[ -z "$(find "$WEIGHTS_FOLDER" -type f)" ] || fail "404 left a file"

# nowhere to write: root may write anywhere but to a read-only file system
again ""
mkdir -p "$WEIGHTS_FOLDER"
if [ "$(id -u)" != 0 ]; then
    chmod a-w "$WEIGHTS_FOLDER"
    expect 6 'tiny/config.json: cannot be written: Permission denied' "$weights"
    chmod u+w "$WEIGHTS_FOLDER"
elif mount -t tmpfs -o ro tmpfs "$WEIGHTS_FOLDER" 2>/dev/null; then
    trap 'kill "$server" 2>/dev/null; umount "$WEIGHTS_FOLDER"' EXIT
    expect 6 'tiny/config.json: cannot be written: Read-only file system' "$weights"
    umount "$WEIGHTS_FOLDER"
    trap 'kill "$server" 2>/dev/null || true' EXIT
fi

# a last line without its newline counts
cp "$WEIGHTS_TABLE" "$TMPDIR/ended.txt"
truncate -s -1 "$WEIGHTS_TABLE"
again ""
expect 0 'tiny/model.safetensors: fetching 293KiB' "$weights"
whole "table without a final newline"
cp "$TMPDIR/ended.txt" "$WEIGHTS_TABLE"

# without curl what is there is checked, the others are named
mkdir "$TMPDIR/bin"
for tool in env bash dirname stat sha256sum; do
    ln -s "$(command -v "$tool")" "$TMPDIR/bin"
done
expect 0 'model.safetensors: there and right' env PATH="$TMPDIR/bin" "$weights"
rm "$small"
expect 6 'curl is not installed: install it, or fetch' env PATH="$TMPDIR/bin" "$weights"
grep -q 'model.safetensors: there and right$' "$TMPDIR/out" || fail "what is there was not checked"
grep -q -e "-> $small$" "$TMPDIR/out" || fail "what is missing is not named"
! grep -q -e "-> $large$" "$TMPDIR/out" || fail "what is there is listed as missing"
echo mine >"$large"
expect 3 'tiny/model.safetensors: not the published file' env PATH="$TMPDIR/bin" "$weights"

# nobody there: what to put where; files placed by hand are then checked without a request
again ""
kill "$server"
wait "$server" 2>/dev/null || true
expect 6 "cannot reach http://127.0.0.1:[0-9]+ .*put them there" "$weights"
grep -q "someone/tiny/resolve/abc123/model.safetensors$" "$TMPDIR/out" || fail "no address"
grep -q -e "-> $large$" "$TMPDIR/out" || fail "no path"
mkdir -p "${large%/*}"
cp "$here"/* "${large%/*}"
expect 0 'model.safetensors: there and right' "$weights"
expect 6 "cannot reach http://nobody.invalid .curl: exit status 6" \
    env HF_ENDPOINT=http://nobody.invalid WEIGHTS_FOLDER="$TMPDIR/other" "$weights"
echo "weights_download: all as expected"
