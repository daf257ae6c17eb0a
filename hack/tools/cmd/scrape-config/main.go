// scrape-config reads rendered manifests on stdin and prints the configuration of Prometheus that prometheus-operator
// would make of the PodMonitors and ServiceMonitors among them. Other kinds are passed over; an unknown field is an
// error, as it is for an API server that validates strictly.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"

	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"github.com/prometheus-operator/prometheus-operator/pkg/assets"
	"github.com/prometheus-operator/prometheus-operator/pkg/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

var separator = regexp.MustCompile(`(?m)^---.*$`)

type monitors struct {
	services map[string]*monitoringv1.ServiceMonitor
	pods     map[string]*monitoringv1.PodMonitor
}

// read sorts the monitors among the documents by namespace and name.
func read(documents []byte, namespace string) (monitors, error) {
	found := monitors{map[string]*monitoringv1.ServiceMonitor{}, map[string]*monitoringv1.PodMonitor{}}
	for index, document := range separator.Split(string(documents), -1) {
		var kind metav1.TypeMeta
		if err := yaml.Unmarshal([]byte(document), &kind); err != nil {
			return found, fmt.Errorf("document %d: %w", index, err)
		}
		var object metav1.ObjectMetaAccessor
		switch kind.Kind {
		case "ServiceMonitor":
			object = &monitoringv1.ServiceMonitor{}
		case "PodMonitor":
			object = &monitoringv1.PodMonitor{}
		default:
			continue
		}
		if err := yaml.UnmarshalStrict([]byte(document), object); err != nil {
			return found, fmt.Errorf("document %d (%s): %w", index, kind.Kind, err)
		}
		meta := object.GetObjectMeta()
		if meta.GetNamespace() == "" {
			meta.SetNamespace(namespace)
		}
		key := meta.GetNamespace() + "/" + meta.GetName()
		switch monitor := object.(type) {
		case *monitoringv1.ServiceMonitor:
			found.services[key] = monitor
		case *monitoringv1.PodMonitor:
			found.pods[key] = monitor
		}
	}
	if len(found.services)+len(found.pods) == 0 {
		return found, errors.New("no PodMonitor and no ServiceMonitor among the documents")
	}
	return found, nil
}

// generate returns Prometheus' configuration for the monitors.
func generate(found monitors, namespace, version, interval string) ([]byte, error) {
	instance := &monitoringv1.Prometheus{ObjectMeta: metav1.ObjectMeta{Name: "scrape-config", Namespace: namespace}}
	instance.Spec.Version = version
	instance.Spec.ScrapeInterval = monitoringv1.Duration(interval)
	instance.Spec.EvaluationInterval = monitoringv1.Duration(interval)
	generator, err := prometheus.NewConfigGenerator(nil, instance)
	if err != nil {
		return nil, err
	}
	store := assets.NewStoreBuilder(nil, nil)
	return generator.GenerateServerConfiguration(
		instance, found.services, found.pods, nil, nil, store, nil, nil, nil, nil,
	)
}

func run(input io.Reader, output io.Writer, namespace, version, interval string) error {
	documents, err := io.ReadAll(input)
	if err != nil {
		return err
	}
	found, err := read(documents, namespace)
	if err != nil {
		return err
	}
	config, err := generate(found, namespace, version, interval)
	if err != nil {
		return err
	}
	// The configuration reloader beside Prometheus fills these in.
	filled := strings.NewReplacer("$(SHARD)", "0", "$(POD_NAME)", "scrape-config-0").Replace(string(config))
	_, err = io.WriteString(output, filled)
	return err
}

func main() {
	namespace := flag.String("namespace", "default", "namespace of monitors that name none")
	version := flag.String("version", "v3.7.3", "version of Prometheus")
	interval := flag.String("interval", "30s", "interval of scrapes, where a monitor has none, and of rules")
	flag.Parse()
	if err := run(os.Stdin, os.Stdout, *namespace, *version, *interval); err != nil {
		fmt.Fprintln(os.Stderr, "scrape-config:", err)
		os.Exit(1)
	}
}
