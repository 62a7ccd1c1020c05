#!/bin/bash
# First process of a node of the test cluster, in namespaces of its own: node.sh NAME ADDRESS ADDRESS_OF_IB0 FOLDER, addresses with /PREFIX
set -e
hostname "$1"
mount -t proc proc /proc
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount --bind "$4/hosts" /etc/hosts
ip link set lo up
until ip link show eth0 > /dev/null 2>&1 && ip link show ib0 > /dev/null 2>&1; do sleep 0.02; done  # the parent creates them
ip addr add "$2" dev eth0
ip addr add "$3" dev ib0
ip link set eth0 up
ip link set ib0 up
cd /
slurmd -D -N "$1" &
while :; do wait || true; sleep 0.2; done  # like init: reaps orphans, and outlives slurmd as the job steps do
