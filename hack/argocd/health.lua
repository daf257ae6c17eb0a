-- Health of a DPOJob for Argo CD: paste it into argocd-cm under the key
--   resource.customizations.health.dpo-operator.dev_DPOJob
-- A job that trains is Progressing, for as long as it takes; Healthy is one whose model is exported.
local health = { status = "Progressing", message = "The operator has not processed the job yet." }
local status = obj.status
if status == nil then
  return health
end

local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end

local function is(kind, value)
  return conditions[kind] ~= nil and conditions[kind].status == value
end

-- A finished job stays what it is, whatever becomes of its runPolicy afterwards. A rejected one can be corrected.
if is("Succeeded", "True") then
  return { status = "Healthy", message = conditions["Succeeded"].message }
end
if is("Failed", "True") and is("Accepted", "True") then
  return { status = "Degraded", message = conditions["Failed"].message }
end
if status.observedGeneration ~= nil and obj.metadata.generation ~= nil
    and status.observedGeneration < obj.metadata.generation then
  health.message = "The change has not been looked at yet."
  return health
end
if is("Suspended", "True") then
  return { status = "Suspended", message = conditions["Suspended"].message }
end
-- What needs somebody: a spec that cannot run, an image that cannot be pulled, a run that goes wrong.
local bad = {
  { "Accepted", "False" },
  { "Progressing", "False" },
  { "Finite", "False" },
  { "ReferenceConsistent", "False" },
  { "TrainingStalled", "True" },
}
for _, pair in ipairs(bad) do
  if is(pair[1], pair[2]) then
    return { status = "Degraded", message = conditions[pair[1]].message }
  end
end
if status.message ~= nil then
  health.message = status.message
end
return health
