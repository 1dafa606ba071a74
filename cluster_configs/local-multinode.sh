#!/usr/bin/env bash
# A Ray cluster of several nodes on this machine: one `ray start` for the head and one for each worker, each with a
# loopback address of its own. For demonstrations and tests; it ends with COMMAND, or with Ctrl-C when there is none.
# Ray listens on every interface all the same (only the job server keeps to loopback); the token is what keeps it shut.
#
#   cluster_configs/local-multinode.sh [-n WORKERS] [-c CPUS_PER_NODE] [-m STORE_MB] [-- COMMAND...]
#   cluster_configs/local-multinode.sh -n 1 -- hedwig submit experiments/demo.yaml output=$PWD/runs/demo
#
# COMMAND finds the job server in RAY_API_SERVER_ADDRESS, the cluster in HEDWIG_CLUSTER (for cluster.address), the token
# in RAY_AUTH_TOKEN_PATH. Nothing but these processes is stopped, by their ids. The `ray` on PATH is used, or .venv's.
set -euo pipefail

main() { # read whole before it runs: bash reads a file as it goes, and an edit would run lines again
workers=1 cpus=2 store_mb=100
usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while getopts "n:c:m:h" option; do
  case $option in
    n) workers=$OPTARG ;;
    c) cpus=$OPTARG ;;
    m) store_mb=$OPTARG ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
for number in "$workers" "$cpus" "$store_mb"; do [[ $number =~ ^[0-9]{1,5}$ ]] || usage; done
[ "$workers" -le 8 ] || { echo "local-multinode: at most 8 workers, one machine carries no more" >&2; exit 2; }
[ "$store_mb" -ge 75 ] || { echo "local-multinode: an object store has at least 75 MB (-m)" >&2; exit 2; }

root=$(cd "$(dirname "$0")/.." && pwd)
command -v ray >/dev/null || PATH=$root/.venv/bin:$PATH
export PATH
folder=$(mktemp -d /tmp/hedwig-ray.XXXX) # short: Ray's socket paths have at most 107 characters
pids=()

stop() {
  trap - EXIT INT TERM
  local pid deadline=$((SECONDS + 30))
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null && [ $SECONDS -lt $deadline ]; do sleep 0.2; done
    kill -KILL -- "-$pid" 2>/dev/null || true # its group: a node that failed to start leaves its parts behind
  done
  rm -rf "$folder"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The token is made here, is readable by this user only, and dies with the folder.
(umask 077 && python3 -c 'import secrets; print(secrets.token_hex(32), end="")' >"$folder/token")
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token RAY_worker_niceness=0

free_ports() {
  python3 - "$1" <<'PYTHON'
import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(s.getsockname()[1] for s in held))
PYTHON
}
read -r gcs dashboard client <<<"$(free_ports 3)"

start() { # start NAME ARGUMENT...: one node, its own log and process group
  # Ray gives a node 30 s to start, fixed. On a very busy machine that can fail; then try again.
  local name=$1 agent
  shift
  agent=$(free_ports 1)
  setsid ray start --block --disable-usage-stats --num-cpus="$cpus" --object-store-memory=$((store_mb << 20)) \
    --dashboard-agent-listen-port="$agent" --min-worker-port=0 --max-worker-port=0 "$@" \
    >"$folder/$name.log" 2>&1 </dev/null &
  pids+=($!)
}

# 127.0.0.1 would be replaced by the machine's own address; any other of 127.0.0.0/8 stays.
start head --head --node-ip-address=127.0.1.1 --port="$gcs" --ray-client-server-port="$client" \
  --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --temp-dir="$folder/ray"

wait_until() { # wait_until TEXT PYTHON: try it until it is so, for two minutes
  local deadline=$((SECONDS + 120)) pid
  until python3 -c "$2" >/dev/null 2>&1; do
    for pid in "${pids[@]}"; do
      kill -0 "$pid" 2>/dev/null || { echo "local-multinode: a node ended:" >&2; tail -n 20 "$folder"/*.log >&2; exit 1; }
    done
    [ $SECONDS -lt $deadline ] || { echo "local-multinode: $1" >&2; tail -n 20 "$folder"/*.log >&2; exit 1; }
    sleep 1
  done
}
ask="import json, os, urllib.request as u
def get(path):
    token = open(os.environ['RAY_AUTH_TOKEN_PATH']).read()
    request = u.Request('http://127.0.0.1:$dashboard' + path, headers={'Authorization': 'Bearer ' + token})
    return json.load(u.build_opener(u.ProxyHandler({})).open(request, timeout=5))
"
wait_until "the head did not come up" "$ask
get('/api/version')"
# Every node has its own folder: sharing one, a node that unpacks a job's files deletes them under the job elsewhere.
for ((i = 1; i <= workers; i++)); do
  start "worker$i" --address="127.0.1.1:$gcs" --node-ip-address="127.0.1.$((i + 1))" --temp-dir="$folder/worker$i"
done
wait_until "not all of $((workers + 1)) nodes came up" "$ask
nodes = get('/nodes?view=summary')['data']['summary']
assert sum(n['raylet'].get('state') == 'ALIVE' for n in nodes) == $((workers + 1))"

export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard HEDWIG_CLUSTER=127.0.1.1:$gcs
echo "local-multinode: $((workers + 1)) nodes of $cpus CPUs; jobs: $RAY_API_SERVER_ADDRESS, token: \$RAY_AUTH_TOKEN_PATH" \
  "= $RAY_AUTH_TOKEN_PATH" >&2
if [ $# -gt 0 ]; then
  "$@"
else
  echo "local-multinode: Ctrl-C stops it" >&2
  wait
fi
}

main "$@"
exit
