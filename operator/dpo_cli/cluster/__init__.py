"""The commands of `dpo` for jobs on a cluster. They reach it through kubectl, with the user's kubeconfig."""
