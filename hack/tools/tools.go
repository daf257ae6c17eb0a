//go:build tools

// Package tools pins the programs that the tests run. Each line names a package and, in its comment, its program.
// hack/build-tools.sh builds them in this order, which is roughly the one in which the tests ask for them. Programs that
// only `make test` or only `make e2e` runs are marked.
//
// They share one module, and so one version of each dependency: client-go, gRPC and the Kubernetes API types are
// compiled once for all of them, not once for each. That halves a first build. A version of a dependency may therefore
// be newer or older than the one that a program's own release has. The training-operator has a module of its own,
// because it needs a later client-go and controller-runtime than Kubernetes and Kueue here can be built with.
package tools

import _ "github.com/versity/versitygw/cmd/versitygw"                        // versitygw
import _ "go.etcd.io/etcd/server/v3"                                         // etcd
import _ "k8s.io/kubernetes/cmd/kube-apiserver"                              // kube-apiserver
import _ "k8s.io/kubernetes/cmd/kube-controller-manager"                     // kube-controller-manager
import _ "k8s.io/kubernetes/cmd/kubectl"                                     // kubectl
import _ "helm.sh/helm/v3/cmd/helm"                                          // helm
import _ "github.com/dpo-operator/dpo-operator/hack/tools/cmd/scrape-config" // scrape-config
import _ "github.com/prometheus/prometheus/cmd/promtool"                     // promtool test
import _ "github.com/prometheus/prometheus/cmd/prometheus"                   // prometheus
import _ "sigs.k8s.io/kueue/cmd/kueue"                                       // kueue test
import _ "k8s.io/kubernetes/cmd/kube-scheduler"                              // kube-scheduler e2e
import _ "k8s.io/kubernetes/cmd/kube-proxy"                                  // kube-proxy e2e
import _ "k8s.io/kubernetes/cmd/kubelet"                                     // kubelet e2e
import _ "github.com/dpo-operator/dpo-operator/hack/tools/cmd/coredns"       // coredns e2e
import _ "github.com/moby/buildkit/cmd/buildctl"                             // buildctl e2e
import _ "github.com/moby/buildkit/cmd/buildkitd"                            // buildkitd e2e
