#!/usr/bin/env bash
# The recorded search: started, killed after twelve candidates, resumed, and what it leaves copied to a folder.
#   bash experiments/gpu-search/record.sh OUT [--set key.path=value ...]
set -u
out=$1; shift
run=$(mktemp -d)/run
mkdir -p "$out"
trials() { find "$run/trials" -name '*.json' 2> /dev/null | wc -l; }

archsearch run --space "${SPACE:-experiments/gpu-search/space.yaml}" --out "$run" "$@" 2> "$out/run.txt" &
driver=$!
while kill -0 $driver 2> /dev/null && [ "$(trials)" -lt 12 ]; do sleep 0.3; done
kill -9 $driver || { cat "$out/run.txt"; exit 1; }                  # it ended by itself, before that
echo "SIGKILL with $(trials) candidates" | tee "$out/killed.txt"
wait $driver

archsearch resume "$run" 2> "$out/resume.txt"
archsearch inspect "$run" > "$out/inspect.txt"                     # time shares in its last lines
archsearch inspect "$run" --why --json > "$out/results.json"
cp "$run"/{config.yaml,environment.json,pareto.csv,pareto.png} "$out"
python - "$run/trials" > "$out/candidates.jsonl" << 'PY'            # outcome, seconds of each phase, paths
import json, pathlib, sys

keys = "outcome", "objectives", "seconds", "paths", "device", "attempts"
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    found = json.loads(path.read_text())
    about = {key: found["metrics"].get(key) for key in ("notation", "parameters", "tokens_per_second")}
    print(json.dumps({"trial": int(path.stem)} | about | {key: found[key] for key in keys}))
PY
