{{- define "dpo.test.namespace" -}}
{{- default .Release.Namespace (default (first .Values.watchNamespaces) .Values.test.namespace) -}}
{{- end -}}

{{- /* Names of DPOJobs have 45 characters at most. */ -}}
{{- define "dpo.test.name" -}}
{{- printf "%s-test" (include "dpo.fullname" . | trunc 40 | trimSuffix "-") -}}
{{- end -}}

{{- define "dpo.test.claim" -}}
{{- default (include "dpo.test.name" .) .Values.test.storage.claim -}}
{{- end -}}

{{- /* Whether the test creates its own PersistentVolumeClaim: "true" or nothing. */ -}}
{{- define "dpo.test.ownClaim" -}}
{{- if and (include "dpo.test.ownData" .) (not .Values.test.storage.claim) }}true{{ end -}}
{{- end -}}

{{- /* Whether the test creates its own model and data: "true" or nothing. */ -}}
{{- define "dpo.test.ownData" -}}
{{- if not (or (hasKey .Values.test.spec "model") (hasKey .Values.test.spec "data")) }}true{{ end -}}
{{- end -}}

{{- /* Annotations of a hook. Takes (list weight). The pod that reports the result is kept, for its log. */ -}}
{{- define "dpo.test.hook" -}}
helm.sh/hook: test
helm.sh/hook-weight: {{ index . 0 | quote }}
helm.sh/hook-delete-policy: before-hook-creation{{ if index . 1 }},hook-succeeded{{ end }}
{{- end -}}

{{- define "dpo.test.spec" -}}
{{- $claim := include "dpo.test.claim" . -}}
data:
  train:
    - uri: pvc://{{ $claim }}/train.jsonl
  validation:
    - name: held
      uri: pvc://{{ $claim }}/valid.jsonl
  maxLength: 32
model:
  huggingFace:
    uri: pvc://{{ $claim }}/model/
training:
  globalBatchSize: 12
  epochs: 3
  learningRate: 1.0e-3
  precision: fp32
  schedule: {warmupSteps: 1}
  packing: {maxTokens: 512}
resources:
  gpusPerNode: 0
  processesPerNode: 1
  cpu: "1"
  memory: 2Gi
  shm: 64Mi
checkpoint:
  uri: pvc://{{ $claim }}/runs/@TIME@/
  gracePeriodSeconds: 30
runPolicy:
  maxRestarts: 1
{{- /* Without pull secrets for trainers, use the operator's: both images often come from the same registry. */ -}}
{{- $pull := empty .Values.trainer.imagePullSecrets | ternary .Values.imagePullSecrets (list) }}
{{- if or .Values.test.fsGroup $pull }}
podTemplate:
  {{- with .Values.test.fsGroup }}
  security:
    fsGroup: {{ int64 . }}
  {{- end }}
  {{- with $pull }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "dpo.test.pod" -}}
restartPolicy: Never
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
