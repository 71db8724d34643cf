"""The key structure of the reference repository's two kinds of YAML, with values of our own."""

# The keys of the reference's LightningDiT YAML.
LIGHTNINGDIT = """
ckpt_path: 'path/to/a.pt'
data:
  data_path: 'path/to/latents'
  fid_reference_file: 'path/to/reference.npz'
  image_size: 256
  num_classes: 1000
  num_workers: 4
  latent_norm: true
  latent_multiplier: 1.0
vae: {model_name: 'vavae_f16d32', downsample_ratio: 16}
model:
  model_type: LightningDiT-XL/1
  use_qknorm: false
  use_swiglu: true
  use_rope: true
  use_rmsnorm: true
  wo_shift: false
  in_chans: 32
train:
  max_steps: 80000
  global_batch_size: 1024
  global_seed: 0
  output_dir: 'output'
  exp_name: 'xl'
  ckpt: null
  log_every: 100
  ckpt_every: 20000
optimizer: {lr: 0.0002, beta2: 0.95}
transport:
  path_type: Linear
  prediction: velocity
  loss_weight: null
  sample_eps: null
  train_eps: null
  use_cosine_loss: true
  use_lognorm: true
sample:
  mode: ODE
  sampling_method: euler
  atol: 0.000001
  rtol: 0.001
  reverse: false
  likelihood: false
  num_sampling_steps: 250
  cfg_scale: 10.0
  per_proc_batch_size: 4
  fid_num: 50000
  cfg_interval_start: 0.11
  timestep_shift: 0.3
"""

# The keys of the reference's tokenizer YAML; its three-stage template leaves five values empty.
TOKENIZER = """
ckpt_path: /path/to/ckpt
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.autoencoder.AutoencoderKL
  params:
    monitor: val/rec_loss
    embed_dim: 32
    use_vf: dinov2
    reverse_proj: true
    lossconfig:
      target: ldm.modules.losses.LPIPSWithDiscriminator
      params:
        disc_start:
        kl_weight: 1.0e-06
        disc_weight: 0.5
        vf_weight:
        adaptive_vf: true
        distmat_margin:
        cos_margin:
    ddconfig:
      double_z: true
      z_channels: 32
      resolution: 256
      in_channels: 3
      out_ch: 3
      ch: 128
      ch_mult:
      - 1
      - 1
      - 2
      - 2
      - 4
      num_res_blocks: 2
      attn_resolutions:
      - 16
      dropout: 0.0
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 8
    wrap: true
    train: {target: ldm.data.imagenet.ImageNetTrain, params: {data_root: /data/imagenet}}
    validation: {target: ldm.data.imagenet.ImageNetValidation, params: {data_root: /data/imagenet}}
lightning:
  trainer:
    devices: 8
    num_nodes: 4
    strategy: ddp_find_unused_parameters_true
    accelerator: gpu
    max_epochs:
    precision: 32
"""
