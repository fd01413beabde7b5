#!/bin/bash
# Make a run on a cluster of Ray of which this machine is the head. On each other machine, before:
#
#     ray start --address=THIS_MACHINE:6379
#
#     examples/cluster/ray.sh my.yaml 8
set -eu
ray start --head --port=6379
RAY_ADDRESS=auto fuselm run "$1" capture.engine=ray capture.workers="$2"
