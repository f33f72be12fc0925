#!/usr/bin/env bash
# Two hosts on one machine: network namespaces joined by a veth pair, one rank on each, gloo across the pair.
#
#   sudo tests/parallel/two_hosts.sh RECIPE [key=value ...]
#
# The hosts share the disk; each prepares the rows in a folder of its own, as nodes without a shared one do. Ends with
# the bytes that went over the wire. Needs the right to make network namespaces (root).
set -euo pipefail

recipe=$1
shift
work=$(mktemp -d)
id=$$
trap 'ip netns del "ft-a-$id" 2>/dev/null; ip netns del "ft-b-$id" 2>/dev/null; rm -rf "$work"' EXIT

ip netns add "ft-a-$id"
ip netns add "ft-b-$id"
ip link add "va$id" netns "ft-a-$id" type veth peer name "vb$id" netns "ft-b-$id"
for host in a b; do
  ip -n "ft-$host-$id" addr add "10.77.0.$([ "$host" = a ] && echo 1 || echo 2)/24" dev "v$host$id"
  ip -n "ft-$host-$id" link set "v$host$id" up
  ip -n "ft-$host-$id" link set lo up
done

start() {  # host, rank of the node
  ip netns exec "ft-$1-$id" env \
    GLOO_SOCKET_IFNAME="v$1$id" ACCELERATE_USE_CPU=true HF_HUB_OFFLINE=1 \
    "${PYTHON:-python}" -m torch.distributed.run --nnodes 2 --node_rank "$2" --nproc_per_node 1 \
    --rdzv_backend c10d --rdzv_endpoint 10.77.0.1:29577 --rdzv_id two-hosts \
    --rdzv_conf "is_host=$((1 - $2))" --local_addr "10.77.0.$(($2 + 1))" \
    -m finetuner.train "$recipe" "dataset_prepared_path=$work/prepared-$1" "${@:3}"
}

start b 1 "$@" >"$work/b.log" 2>&1 &
other=$!
status=0
start a 0 "$@" || status=$?
wait "$other" || { status=$?; cat "$work/b.log"; }
echo "prepared: $(find "$work" -name prepared.json | wc -l) folders on two hosts"
echo "received: $(ip -n "ft-a-$id" -s -j link show "va$id" | grep -o '"rx":{"bytes":[0-9]*' | grep -o '[0-9]*$') bytes on host a"
exit "$status"
