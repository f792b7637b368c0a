http_options:
  host: 127.0.0.1
  port: 8000
applications:
- name: readapt-r
  route_prefix: null
  import_path: readapt_ray.serving.app:version
  args:
    name: r
    retriever: r
- name: readapt
  route_prefix: /
  import_path: readapt_ray.serving.app:gateway
  args:
    retriever: r
