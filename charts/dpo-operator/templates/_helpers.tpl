{{- define "dpo.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- /* Name of the release's objects; 50 characters leave room for suffixes. */ -}}
{{- define "dpo.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "dpo.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Selects the operator's pod and not the pods of `helm test`. */ -}}
{{- define "dpo.selector" -}}
app.kubernetes.io/name: {{ include "dpo.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "dpo.labels" -}}
{{- $ours := dict
      "app.kubernetes.io/name" (include "dpo.name" .)
      "app.kubernetes.io/instance" .Release.Name
      "app.kubernetes.io/version" .Chart.AppVersion
      "app.kubernetes.io/managed-by" .Release.Service
      "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_") -}}
{{- toYaml (merge $ours .Values.commonLabels) -}}
{{- end -}}

{{- /* A reference to an image: digest, else tag, else the chart's appVersion. Takes (list image root). */ -}}
{{- define "dpo.image" -}}
{{- $image := index . 0 -}}
{{- $root := index . 1 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "dpo.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "dpo.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "dpo.priorityClass" -}}
{{- if .Values.priorityClass.create -}}
{{- default (include "dpo.fullname" .) .Values.priorityClass.name -}}
{{- else -}}
{{- .Values.priorityClassName -}}
{{- end -}}
{{- end -}}

{{- /* NAME=VALUE,… for a flag. Takes (list map name-of-the-value). */ -}}
{{- define "dpo.pairs" -}}
{{- $pairs := list -}}
{{- $of := index . 1 -}}
{{- range $name, $value := index . 0 -}}
{{- if regexMatch ",[A-Za-z_][A-Za-z0-9_.-]*=" (toString $value) -}}
{{- fail (printf "%s.%s: %q contains a comma followed by NAME=, which would start another variable; set it in each job's podTemplate instead" $of $name $value) -}}
{{- end -}}
{{- $pairs = append $pairs (printf "%s=%s" $name (toString $value)) -}}
{{- end -}}
{{- join "," $pairs -}}
{{- end -}}

{{- /* A list or mapping as the JSON of a flag; nothing if it is empty. */ -}}
{{- define "dpo.json" -}}
{{- with . }}{{ toJson . }}{{ end -}}
{{- end -}}

{{- /* A number as text, a whole one without an exponent. */ -}}
{{- define "dpo.number" -}}
{{- if eq (floor .) (float64 .) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end -}}

{{- /* Seconds of a flag; nothing for null. */ -}}
{{- define "dpo.seconds" -}}
{{- if not (kindIs "invalid" .) }}{{ int64 . }}{{ end -}}
{{- end -}}

{{- /* NAME,… from a list of objects with a name, for a flag. */ -}}
{{- define "dpo.names" -}}
{{- $names := list -}}
{{- range . }}{{ $names = append $names .name }}{{ end -}}
{{- join "," $names -}}
{{- end -}}

{{- /* Whether to create objects of a kind of the Prometheus operator: "true" or nothing. Takes (list kind root). */ -}}
{{- define "dpo.monitored" -}}
{{- $root := index . 1 -}}
{{- $way := $root.Values.monitoring.enabled -}}
{{- if or (eq $way "always") (and (eq $way "auto") ($root.Capabilities.APIVersions.Has (printf "monitoring.coreos.com/v1/%s" (index . 0)))) -}}
true
{{- end -}}
{{- end -}}

{{- /* Whether to create the ValidatingAdmissionPolicies: "true" or nothing. */ -}}
{{- define "dpo.admission" -}}
{{- $way := .Values.admissionPolicy.enabled -}}
{{- if or (eq $way "always") (and (eq $way "auto") (.Capabilities.APIVersions.Has "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy")) -}}
true
{{- end -}}
{{- end -}}

{{- define "dpo.restricted" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
readOnlyRootFilesystem: true
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- end -}}
