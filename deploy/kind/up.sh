#!/usr/bin/env bash
# A kind cluster with DistTrain, Prometheus, Grafana and the digits example: make kind. Run again after a change: it updates the cluster.
#   GRAFANA_PORT   Grafana's port on this machine [3000]; a cluster that is there keeps its own
#   TORCH_INDEX    package index to take torch from, such as PyTorch's of CPU wheels: an image of 1 GB in place of 6
#   EXAMPLE        the job to start [examples/digits-ps.yaml]
set -euo pipefail

readonly CLUSTER=disttrain
readonly CONTEXT=kind-$CLUSTER
readonly TAG=dev
readonly GRAFANA_NODE_PORT=30300
readonly EXAMPLE=${EXAMPLE:-examples/digits-ps.yaml}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."

fail() {
  echo "make kind: $*" >&2
  exit 2
}

say() {
  echo "==> $*"
}

cluster_kubectl() {
  kubectl --context "$CONTEXT" "$@"
}

# --- what has to be there

command -v docker >/dev/null || fail "docker is not installed: see https://docs.docker.com/get-docker/"
command -v kind >/dev/null || fail "kind is not installed: see https://kind.sigs.k8s.io/docs/user/quick-start/#installation"
command -v kubectl >/dev/null || fail "kubectl is not installed: see https://kubernetes.io/docs/tasks/tools/"
docker buildx version >/dev/null 2>&1 || fail "docker lacks its buildx plugin, which the Dockerfile needs: see https://docs.docker.com/go/buildx/"
docker info >/dev/null 2>&1 || fail "docker is installed, but its daemon does not answer: is it started, and may you use it?"
[[ ${GRAFANA_PORT:-3000} =~ ^[0-9]+$ ]] || fail "GRAFANA_PORT=$GRAFANA_PORT is not a port"
[[ -f $EXAMPLE ]] || fail "there is no file $EXAMPLE"

# --- cluster

if kind get clusters 2>/dev/null | grep -x "$CLUSTER" >/dev/null; then
  # A port is mapped when the cluster is made, and never after. Several lines: one for each address.
  mapped=$(docker port "$CLUSTER-control-plane" "$GRAFANA_NODE_PORT/tcp" 2>/dev/null) || mapped=""
  mapped=${mapped%%$'\n'*}
  port=${mapped##*:}
  [[ -n $port ]] || fail "the kind cluster $CLUSTER maps no port for Grafana, so it is not of this script: make kind-down deletes it"
  [[ ${GRAFANA_PORT:-$port} == "$port" ]] ||
    fail "the kind cluster $CLUSTER has Grafana on port $port: leave GRAFANA_PORT out, or make kind-down before another port"
  say "the kind cluster $CLUSTER is there and is used"
  fresh=false
else
  port=${GRAFANA_PORT:-3000}
  say "creating the kind cluster $CLUSTER"
  sed "s/hostPort: 3000/hostPort: $port/" deploy/kind/cluster.yaml | kind create cluster --config - --wait 120s
  fresh=true
fi

# --- images

for target in operator trainer; do
  say "building disttrain/$target:$TAG"
  docker build --target "$target" --tag "disttrain/$target:$TAG" ${TORCH_INDEX:+--build-arg "TORCH_INDEX=$TORCH_INDEX"} .
  say "loading disttrain/$target:$TAG into the cluster"
  kind load docker-image "disttrain/$target:$TAG" --name "$CLUSTER"
done

# --- DistTrain

say "installing the operator, Prometheus and Grafana"
cluster_kubectl apply -k deploy/overlays/kind
if [[ $fresh == false ]]; then
  # The tag is the same as before, so that nothing else would tell the pods of new images.
  cluster_kubectl rollout restart deployment --namespace disttrain-system
fi
for namespace in disttrain-system disttrain-monitoring; do
  for deployment in $(cluster_kubectl get deployment --namespace "$namespace" --output name); do
    cluster_kubectl rollout status "$deployment" --namespace "$namespace" --timeout=300s ||
      fail "$deployment did not become ready: kubectl --context $CONTEXT describe pods -n $namespace"
  done
done

# --- a job

# A finished job is never started again, and an apply of the same file changes nothing: with it gone, the new images train.
readonly FIELDS=KIND:.kind,NAMESPACE:.metadata.namespace,NAME:.metadata.name,STATE:.status.state
existing=$(cluster_kubectl get -f "$EXAMPLE" --ignore-not-found --no-headers --output "custom-columns=$FIELDS")
while read -r kind namespace name state; do
  [[ $kind == DistTrainJob ]] || continue
  case $state in
  Complete | Failed)
    say "deleting the finished job $name"
    cluster_kubectl delete disttrainjob "$name" --namespace "$namespace"
    ;;
  *) say "the job $name is in work and goes on with the image that it started with" ;;
  esac
done <<<"$existing"

say "starting $EXAMPLE"
cluster_kubectl apply -f "$EXAMPLE"

cat <<TEXT

DistTrain runs. Grafana: http://localhost:$port  (dashboards in the folder DistTrain)

  kubectl --context $CONTEXT get dtj --watch
  kubectl --context $CONTEXT get pods --selector disttrain.dev/job-name
  kubectl --context $CONTEXT logs --follow --prefix --selector disttrain.dev/role=worker
  kubectl --context $CONTEXT port-forward -n disttrain-monitoring svc/prometheus 9090

To end it all: make kind-down
TEXT
