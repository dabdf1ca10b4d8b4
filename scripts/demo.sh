#!/usr/bin/env bash
# The main job on real input: certify handwritten digits on three networks with a pool of workers, show what came out.
# Everything it makes lies in the folder `demo/`; run again, it finds all jobs done and only reads.
set -euo pipefail
cd "$(dirname "$0")/.."
netassay="${VENV:-.venv}/bin/netassay"
mkdir -p demo
export NETASSAY_HOME="$PWD/demo/.netassay"

say() { printf '\n\033[1m$ netassay %s\033[0m\n' "$*"; "$netassay" "$@"; }

trap '"$netassay" down >/dev/null 2>&1 || true' EXIT
say up --no-flower
say submit examples/digits.yaml
say watch digits
say results digits --by network,radius --columns verdict,correct
say plot digits --out demo/digits.png
say submit examples/fractal.yaml
say watch fractal
say plot fractal --out demo/fractal.png
say down
printf '\nThe figures: demo/digits.png, demo/fractal.png. The store stays in demo/.netassay; ask it:\n'
printf '  NETASSAY_HOME=demo/.netassay %s results digits --csv | head\n' "$netassay"
