// What our blocks look like, as data: colours by role and of wires, and how many lines of text a block shows. Colours of nodes are LiteGraph's own.

export const ROLES = {
  judge: { color: "#323", bgcolor: "#535" },
  sample: { color: "#223", bgcolor: "#335" },
  train: { color: "#232", bgcolor: "#353" },
  look: { color: "#233", bgcolor: "#355" },
};

const NODES = {
  judge: ["LoadReward", "MixRewards", "ReferenceReward", "ScoreImages", "ScoreRollout", "ScoresFromValues", "VoteRollout"],
  sample: [
    "ApplyNoisePrior", "EarlyFilter", "LoadImageFolder", "LoadNoisePrior", "OptimizeNoise", "Rollout", "SearchSampler", "SelectBest",
    "SingularSDESampler", "TinyDemoLoader",
  ],
  train: ["Advantages", "LoRAPolicy", "SaveLoRA", "SubmitTraining", "TrainLoRA", "UpdateFromVotes", "UpdateLoRA"],
  look: ["CompareLoRA", "RunMonitor", "SaveScoredImages", "TrainingResult"],
};

export const ROLE_OF = Object.fromEntries(Object.entries(NODES).flatMap(([role, names]) => names.map((name) => [`G2RPO_${name}`, role])));

export const WIRES = {
  G2RPO_ROLLOUT: "#5c7cfa",
  G2RPO_REWARD: "#b25fd0",
  G2RPO_SCORES: "#c0ca33",
  G2RPO_ADVANTAGES: "#26b5a8",
  G2RPO_POLICY: "#4caf50",
  G2RPO_PRIOR: "#8d9db6",
};

// How many lines of what a block says stay in sight at least; more are scrolled to.
export const TEXT_LINES = {
  G2RPO_Advantages: 7,
  G2RPO_CompareLoRA: 5,
  G2RPO_EarlyFilter: 3,
  G2RPO_LoadImageFolder: 3,
  G2RPO_LoadNoisePrior: 3,
  G2RPO_LoadReward: 4,
  G2RPO_MixRewards: 4,
  G2RPO_ReferenceReward: 4,
  G2RPO_Rollout: 3,
  G2RPO_SaveScoredImages: 2,
  G2RPO_ScoreImages: 7,
  G2RPO_ScoreRollout: 7,
  G2RPO_OptimizeNoise: 5,
  G2RPO_SearchSampler: 4,
  G2RPO_SubmitTraining: 3,
  G2RPO_TrainingResult: 2,
  G2RPO_UpdateFromVotes: 2,
  G2RPO_UpdateLoRA: 2,
};

// Widgets of Train LoRA whose numbers a chosen preset takes the place of.
export const PRESET = {
  widget: "preset",
  none: "as typed",
  replaces: ["steps", "learning_rate", "rank", "alpha", "prompts_per_step", "slots", "eval_every"],
};
