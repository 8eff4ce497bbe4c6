"""The method of the paper's section 3: mini-groups, saliency, selection and removal. Knows no DeepSpeed."""
