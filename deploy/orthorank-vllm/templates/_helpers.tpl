{{- define "orthorank.name" -}}
{{- $name := ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name) -}}
{{ $name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "orthorank.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "orthorank.labels" -}}
{{ include "orthorank.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "orthorank.metadata" -}}
name: {{ include "orthorank.name" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "orthorank.labels" . | nindent 2 }}
{{- end }}

{{- define "orthorank.claim" -}}
{{ .Values.cache.claimName | default (ternary (printf "%s-cache" (include "orthorank.name" . | trunc 57 | trimSuffix "-")) "" .Values.cache.create) }}
{{- end }}

{{/* Whether the cache is a claim that one node alone can mount. */}}
{{- define "orthorank.one-node" -}}
{{- if and .Values.cache.create (not (has "ReadWriteMany" .Values.cache.accessModes)) }}yes{{ end }}
{{- end }}

{{/* What single values cannot be refused for, but together would leave something without effect. */}}
{{- define "orthorank.check" -}}
{{- $v := .Values -}}
{{- if and $v.cache.create $v.cache.claimName }}
{{- fail "cache.create and cache.claimName exclude each other" }}
{{- end }}
{{- if and (include "orthorank.one-node" .) (or (gt (int $v.replicas) 1) $v.autoscaling.enabled) }}
{{- fail "cache.accessModes: several replicas need ReadWriteMany" }}
{{- end }}
{{- if ge (float64 $v.orthorank.calibrateSeconds) (float64 (mul $v.startupProbe.periodSeconds $v.startupProbe.failureThreshold)) }}
{{- fail "orthorank.calibrateSeconds: startupProbe leaves less time than that; raise its failureThreshold" }}
{{- end }}
{{- if and $v.modelDownload.enabled (or $v.model.offline (hasPrefix "/" $v.model.name)) }}
{{- fail "modelDownload.enabled needs a model.name on a model hub, and not model.offline" }}
{{- end }}
{{- if and $v.podMonitor.enabled $v.serviceMonitor.enabled }}
{{- fail "podMonitor.enabled and serviceMonitor.enabled exclude each other: every server would be scraped twice" }}
{{- end }}
{{- if and $v.route.enabled (not $v.route.parentRefs) }}
{{- fail "route.parentRefs is required with route.enabled: the Gateway that it belongs to" }}
{{- end }}
{{- if and (or $v.ingress.enabled $v.route.enabled) $v.networkPolicy.enabled (not (or $v.networkPolicy.gatewayNamespace $v.networkPolicy.from)) }}
{{- fail "networkPolicy.gatewayNamespace is required with ingress.enabled or route.enabled: where its controller runs" }}
{{- end }}
{{- end }}

{{- define "orthorank.hub-token" -}}
{{- with .Values.hfToken.secretName }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.hfToken.key }}
{{- end }}
{{- end }}

{{- define "orthorank.container-security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: ["ALL"]
{{- end }}

{{- define "orthorank.image" -}}
{{- $tag := default (printf "%s-%s" .Chart.AppVersion .Values.image.variant) .Values.image.tag -}}
{{ .Values.image.repository }}{{ with .Values.image.digest }}@{{ . }}{{ else }}:{{ $tag }}{{ end }}
{{- end }}
